"""Between text and token ids: vocabularies, chat formats, and text that comes out piece by piece.

Knows tokenizers and conversations. Does not know models, tensors or requests, and imports nothing
of Moesaic but its errors.
"""
