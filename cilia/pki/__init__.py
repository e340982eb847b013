"""Certificates of mutual TLS, for what leaves the node.

A directory holds one authority and what it issued:

    <dir>/ca.crt            certificates that are trusted, the authority's own first       0644
    <dir>/ca.key            its key                                                        0600
    <dir>/<name>/tls.crt    a certificate for <name>                                       0644
    <dir>/<name>/tls.key    its key                                                        0600
    <dir>/<name>/ca.crt     what its holder trusts                                         0644

A name is a service of a node: its certificate says so in a SPIFFE URI, spiffe://cilia/node/<node>/
<service> (`identity_of` reads it), and it serves both ends of a connection. A holder needs only its
own directory; the authority's key may stay elsewhere.

    authority.py   makes and renews certificates (`cilia cert`)
    files.py       what a service reads, and reads again when it was renewed
"""
