"""gRPC on unix sockets: servers, channels, errors over the wire, shared messages, fan-out.

service:  server.Server(socket=..., services=[add_XServicer_to_server, ...])   a lifecycle part
client:   channel.connect(socket, service="agent")  ->  XStub(channel)
both:     convert.py (labels, identities, faults)   errors.py (DomainError <-> status)
streams:  fanout.BoundedFanout (bounded, and counts what it loses)
"""
