"""Many nodes as one: the same API, answered by asking every node.

peers      who the nodes are, and a connection to each
merge      their flows in the order of time, undecoded
server     the Observer service
"""
