"""Gateways, workers and job stores: one address for many machines.

This package imports nothing itself, because a gateway needs no torch and a worker no job store.
"""
