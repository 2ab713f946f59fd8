"""AIME's API server protocol: AIME's clients and workers at this gateway, and Moesaic workers at AIME's server.

``settings`` reads endpoint definitions. ``parameters`` checks request parameters and ``conversation`` converts them.
``credentials`` checks keys and sessions. ``clients`` and ``workers`` contain the gateway's routes. ``aime_worker`` and
``aime_worker_pool`` keep the state of AIME's workers. ``worker`` connects a Moesaic model to AIME's server.
docs/how-to/aime.md lists the differences from AIME's own server.
"""
