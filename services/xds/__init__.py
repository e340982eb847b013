"""The xDS service: a control plane for Envoy and gRPC, and the node's way to enforce HTTP rules.

It promises: each client gets the resources of its own node and no others; a resource is serialised
once and sent only where it is not held already, also after this service was restarted; clusters
come before what refers to them, and go after it; one refused resource stops no other, and who
refused what and why is kept and shown; a redirect is reported acknowledged only when the proxy
holds and has accepted its listener and its rules; while this service is away, Envoy keeps
enforcing.

Envoy and gRPC clients call it (envoy.service.discovery.v3, over a unix socket or TCP with mutual
TLS), and Envoy sends its access logs here. The agent calls it with redirects; the CLI with
questions. It calls nobody. It launches Envoy when asked to.

    redirects.py   the agent's wishes ─▶ Translator ─▶ ┐
    files.py       a directory of YAML and JSON    ─▶  ├─ cache.py ─▶ hub.py ─▶ stream.py ─▶ wire
    app.py         the translator's base resources ─▶  ┘                  │
                              acks.py: who waits ◀────────────────────────┘

How to put resources in front of clients, and to know that they are enforced:

    cache.put(LDS, "ingress-10001", listener, nodes={"envoy-1"})    # a message, or its bytes
    with cache.transaction() as change:                             # all become visible at once
        change.put(CDS, "backend", cluster)
        change.put(RDS, "routes", routes)
        change.remove(LDS, "old")
    outcome = await acks.acknowledged("envoy-1", {LDS: ["ingress-10001"], RDS: ["routes"]})
    outcome.ok; outcome.refusals                                    # {(type, name): reason}

Without `nodes` a resource is for every client. Putting what is there already changes nothing.
"""
