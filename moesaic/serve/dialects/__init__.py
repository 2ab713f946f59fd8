"""The APIs: one file = one of them.

A file ``dialects/<name>.py`` defines

    ENDPOINTS    its routes: what the body is, what answers it, and how an error is shown

A dialect turns a body into an ``Ask``, hands it to ``Call.ask``, and turns the events that come back into
its own shapes. It never sees a model, an engine or a socket.
"""
