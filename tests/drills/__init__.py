"""Fault drills: processes that train, and are killed, starved of disk or given damaged files; the run must not notice.

nursery.py   a process that has everything imported, and forks the victims: a drill costs a fraction of a second
victim.py    what a victim runs: the toy engine, or `moba-train` itself
faults.py    what befalls it, from outside the code under test: the n-th system call on a checkpoint kills it
runs.py      run folders: one that was never disturbed, copies of it that were stopped half-way, and what is equal
"""
