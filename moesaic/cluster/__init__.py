"""Gateways, workers and job stores: clients of one address are served by many machines.

This file imports nothing, because a gateway must not need torch, and a worker must not need a job store.
"""
