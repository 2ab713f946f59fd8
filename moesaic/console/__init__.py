"""Chat in the terminal.

``conversation`` holds the messages and asks the model. ``conversation_file`` saves and loads conversations.
``commands`` implements the slash commands. ``session`` is the interactive chat, and ``editing`` its line editor.
``one_shot`` answers a single message. ``progress`` draws progress bars, and ``visible`` escapes terminal control
characters. Importing this package imports none of these modules.
"""
