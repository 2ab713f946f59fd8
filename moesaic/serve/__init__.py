"""Models behind HTTP: several APIs over one door.

    dialects/*.parse -> Call.ask -> door.ask -> events -> frames

``app`` puts the routes of all dialects together; ``exchange`` takes one request from its bytes to its
answer; ``guard`` and ``keys`` refuse what must not get that far; ``watch`` counts and times; ``shelf``
holds several models; ``front`` is the server that owns sockets, signals and deadlines. One file in
``dialects`` = one API. Knows ``moesaic.backend`` and nothing of engines: a gateway is the same app over another door.
"""
