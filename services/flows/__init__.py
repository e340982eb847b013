"""The flow service: what passed on this node and what did not, and why; kept, searched, served.

It promises: no Python object is made per event, from the kernel's ring to the client's socket; a
flow keeps the names that were true when it happened; a gap in what is kept is itself kept, with its
cause, so that "no drops seen" differs from "not watching"; the same question reads memory and disk.

It calls the agent (MonitorService.Events), its only source. Clients of Hubble, `cilia flows`, and
relays call it.
"""
