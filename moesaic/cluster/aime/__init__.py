"""The protocol of AIME's API server: its clients and workers at our gateway, and our workers at its server.

``settings`` reads endpoint definitions, ``parameters`` and ``conversation`` are about what a request holds,
``visitors`` about who asks; ``clients`` and ``workers`` are the routes, ``crew`` is what the gateway knows of AIME's
workers, ``worker`` the other side. docs/how-to/aime.md has what differs from AIME's own server.
"""
