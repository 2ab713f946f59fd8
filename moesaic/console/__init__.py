"""The chat in a terminal.

``conversation`` holds what was said and asks the model, ``saved`` keeps it in a file, ``commands`` are the
words with a slash, ``session`` reads and prints, ``editing`` is the line that is typed, ``once`` answers
one question without a session, ``progress`` draws bars, ``visible`` keeps a model from driving the
terminal. Importing this folder imports none of them.
"""
