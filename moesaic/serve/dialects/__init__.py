"""The APIs of the server, called dialects: each file without a leading underscore implements one API.

A file ``dialects/<name>.py`` defines ``ENDPOINTS``: its routes, with the types of their bodies, their handlers, and
the form of their errors.

A dialect turns a body into a ``GenerationRequest``, passes it to ``RequestContext.generate``, and turns the events
into the API's own objects. It does not depend on a model, an engine or a socket.
"""
