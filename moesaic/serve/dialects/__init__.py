"""The APIs of the server: one file is one API.

A file ``dialects/<name>.py`` defines ``ENDPOINTS``: its routes, with the types of their bodies, their handlers, and
how errors are shown.

A dialect turns a body into a ``GenerationRequest``, passes it to ``RequestContext.generate``, and turns the events
into the API's own shapes. It never sees a model, an engine or a socket.
"""
