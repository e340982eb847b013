"""What people ask about policy, answered by the engine that programs the kernel. Pure: no I/O.

inventory   the endpoints a question is about, from a file or from an agent
ports       what a peer may use of a protocol, as ranges
scene       documents and endpoints together, entered into one engine
world       the addresses outside, split where policies tell them apart
matrix      who may talk to whom on what
"""
