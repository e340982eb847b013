"""The `cilia` command: a client like any other.

It speaks gRPC to the agent and to the identity service over their unix sockets, and asks
`cilia.policy` and `cilia.bpf` where no service is needed (`policy validate`, `bpf probe`).
One module a noun; `render` alone knows rich, `shapes` alone turns messages into the
documented JSON (docs/cli.md), `clients` alone opens channels.
"""
