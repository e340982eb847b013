"""Privileged networking: namespaces, netlink, sysctls, mounts. Blocking and idempotent.

    netns.py    open, enter and name network namespaces
    rtnl.py     the netlink socket; pyroute2 writes its messages
    device.py   links, addresses, routes, neighbours
    sysctl.py   settings of a device, in any namespace
    mount.py    bpffs and cgroup2
    watch.py    what changes, as an async iterator

Only `watch` is async; the rest blocks for microseconds to milliseconds (the kernel's RTNL lock may
be held by others), so a service calls it through its own bounded executor. Everything called
`ensure_` may be repeated; deleting what is absent succeeds. Offloads of veth devices stay as the
kernel sets them, but for the length of segments: TSO and GSO across a veth pair are what makes bulk
transfers fast.
"""
