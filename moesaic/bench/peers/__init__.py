"""Engines that the benchmark compares, called peers: each file adapts one engine, which runs in its own process.

A file ``peers/<name>.py`` defines

    LABEL                               name of the engine
    MODULES, PACKAGES                   modules that must be importable, and distributions whose versions are reported
    INSTALL                             command that installs them
    FORMATS                             weight formats, in the engine's own terms
    READS_GGUF                          whether the engine loads a GGUF file as it is
    make(source, folder, weight_format) -> file or folder to load, created inside ``folder`` from the Hugging Face
                                        checkpoint ``source`` unless it exists
    Peer(path, weight_format, threads, context, sequences)

and a ``Peer`` has

    about                               {name: value}: options in force, and information from the engine
    weights                             (bytes of the experts, bytes of all other weights that every step reads)
    prefill(ids)                        compute one prompt without a cached prefix, up to the logits of its last token
    likeliest(ids, count)               the ``count`` most likely next tokens, most likely first
    fill(prompts)                       store the keys and values of these prompts, each in memory of its own
    begin(batch, steps)                 prepare to decode the first ``batch`` prompts for ``steps`` steps
    step(ids)                           run one step with the tokens ``ids``; a whole engine uses its own tokens instead
    end()                               return to the state after ``fill``

``_child.py`` loads such a file by its path, in the Python interpreter in which the engine is installed. The file
therefore imports nothing of Moesaic (except for Moesaic's own two engines), and imports its library only inside
functions. A file may also define

    environment(python)                 environment variables for the process with the interpreter ``python``
"""
