"""Tokenizers, chat formats, tool calls, grammars, and incremental detokenization.

This package does not depend on models, tensors or requests. It imports only ``moesaic.errors``.
"""
