"""HTTP server for models: several APIs (OpenAI, Anthropic, TGI) over one ``Backend``.

    dialects/*  ->  RequestContext.generate  ->  Backend.generate  ->  events  ->  frames

Modules, from the bottom up: ``types`` (ASGI), ``endpoint`` (routes and responses), ``sse`` and ``sender`` (how a
response is sent), ``settings``, ``keys``, ``guard`` (checks before a route), ``json_body``, ``deadline``, ``metrics``,
``generation`` (one running generation), ``services`` (what endpoints share), ``context`` (one request), ``app``
(routes and the order of checks), ``connection`` and ``server`` (sockets, signals, shutdown), ``model_manager`` (several
models), ``presets`` (names for a model with values of their own), ``model_admin`` (their routes for administrators).
One file in ``dialects`` is one API. The package does not depend on an engine: a gateway runs the same application over
another ``Backend``.
"""
