"""The node's datapath service.

It owns the eBPF programs and maps of one node and everything that changes them: endpoints,
their addresses, their policy, who is who (the ipcache), and the stream of events the programs
write. Nothing else writes a map.

Calls:     identity (identities, policies, announced addresses; one gRPC session a node).
Called by: the CLI, flows, the CNI plugin, health.

Promises: no packet of an endpoint passes before its policy is in force; killing this process
breaks no connection and opens nothing; after a restart only what differs is written.
"""
