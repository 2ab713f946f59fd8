"""Compatibility with the AIME API server, a job server for inference by the company AIME.

A Moesaic gateway serves clients and workers that were written for that server ("AIME API clients" and "AIME API
workers"). A Moesaic worker can also run jobs of that server.

``settings`` reads endpoint definitions. ``parameters`` checks request parameters and ``conversation`` converts them.
``credentials`` checks keys and sessions. ``clients`` and ``workers`` contain the gateway's routes. ``aime_worker`` and
``aime_worker_pool`` keep the state of AIME API workers. ``worker`` connects a Moesaic model to the AIME API server.
docs/how-to/aime.md lists the differences from the AIME API server.
"""
