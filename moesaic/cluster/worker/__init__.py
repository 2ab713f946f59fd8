"""The worker process: ``agent`` talks to a gateway, ``running_job`` buffers events, ``replay`` resumes answers."""
