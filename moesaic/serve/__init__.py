"""Models behind HTTP: several APIs over one backend.

    dialects/*  ->  RequestContext.generate  ->  Backend.generate  ->  events  ->  frames

Modules, from the bottom up: ``types`` (ASGI), ``endpoint`` (routes and responses), ``sse`` and ``sender`` (how a
response is sent), ``settings``, ``keys``, ``guard`` (checks before a route), ``json_body``, ``deadline``, ``metrics``,
``generation`` (one running generation), ``services`` (what endpoints share), ``context`` (one request), ``app``
(routes and the order of checks), ``connection`` and ``server`` (sockets, signals, shutdown), ``model_manager`` (several
models). One file in ``dialects`` is one API. Engines are unknown here: a gateway is the same application over another
backend.
"""
