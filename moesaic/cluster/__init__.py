"""Many machines behind one address: jobs that are kept until they are answered, and workers that fetch them.

Nothing is imported here: a gateway needs no torch, and a worker no job store.
"""
