"""Engines that ours is measured against: one file = one peer, run in a process of its own.

A file ``peers/<name>.py`` defines

    LABEL                            what people call it
    MODULES, PACKAGES                what must be importable, and the distributions whose versions are reported
    INSTALL                          the command that makes it so
    FORMATS                          what its weights can be, as the engine itself names it; the first words of a row
    make(source, folder, format)     -> the file or folder to load, made from the Hugging Face checkpoint
                                     ``source`` inside ``folder`` unless it is there already
    Peer(path, format, threads, context, sequences)

and a ``Peer`` has

    about                            {name: value}: the options in force, and what the engine says of itself
    weights                          (bytes of the experts, bytes of all else that every step reads)
    prefill(ids)                     compute one prompt from nothing, up to the logits of its last token
    likeliest(ids, count)            the ``count`` likeliest next tokens, best first
    fill(prompts)                    hold the keys and values of these prompts, each in memory of its own
    begin(batch, steps)              get ready to decode the first ``batch`` prompts for ``steps`` steps
    step(ids)                        one step; ``ids`` are the tokens, but a whole engine goes on with its own
    end()                            be as after ``fill`` again

``_child.py`` loads such a file by its path in whatever interpreter has the peer, so the file imports
nothing of Moesaic (but for our own two) and its library only inside functions. A file may define also

    environment(python)              variables that its process is started with by the interpreter ``python``
"""
