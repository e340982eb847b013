"""Nodes on one machine: namespaces as nodes and workloads, made from a YAML file and unmade again.

    lab file ──spec──▶ up: wire + world + node namespaces, bpffs, cgroup
                       ├─ identity, [xds,] agent[, flows]   started inside the node's netns (setns)
                       ├─ endpoints           added through the agent's API
                       └─ workloads           processes in their namespaces, names from a hosts file

    the machine, one lab:            cil-L-net.wire   bridge br0, nothing else
                                       │        │
                     cil-L-node.node1 eth0     eth0 cil-L-net.world   everything outside the cluster
                       agent, identity            │ default route of the nodes
                       │ cil00001  cil00002
              cil-L-pod.default.web   cil-L-pod.default.db

Nothing is created in the machine's own network namespace, so labs with equal addresses live side
by side. There is no supervisor: processes run in sessions of their own, and what has to be undone
is found again by name (namespaces), by place (/run/cilia-lab/<lab>, its bpffs mounts) and by cgroup
(processes), so `down` works after a SIGKILL of anything at any point. Used by `cilia lab`, the demo
and the tests.
"""
