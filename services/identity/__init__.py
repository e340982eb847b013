"""The identity service: the cluster's state, and the only program that talks to the store.

It promises: one number for each set of labels, given in one store round trip; what it acknowledged
survives a kill at any moment; every watcher gets a snapshot, then each change in order, and is told
(RESET) when it cannot be brought up to date from where it stood; what a node announced vanishes
with the node's lease, and not before.

It calls nobody. Agents, the CLI and later the other services call it, over a unix socket.
"""
