"""Benchmarks and stress tests of a checkout, one script each; run them as ``python -m benchmarks.NAME --help``.

- ``http_share``: how much speed HTTP and a gateway cost an engine.
- ``streams``: the delay that the HTTP layer adds to each token of many concurrent streams.
- ``job_rate``: jobs per second of the job stores.
- ``kill_workers``: whether every job gets its correct answer while gateway and workers are killed at random.
- ``paced_server``: a server that sends events at a fixed rate, to measure the load generator of
  ``moesaic bench serving``.
- ``gguf_quality``: the predictions of a GGUF file in Moesaic and in llama.cpp, which runs
  ``llama_cpp_reference.py`` in its own interpreter.
- ``quantization``: the quality of quantized models, to nearest, calibrated and by llama.cpp, which runs
  ``llama_cpp_quantize.py`` and ``llama_cpp_reference.py``; ``quantization_models`` makes the models.

The scripts import ``moesaic`` and each other, never the tests.
"""
