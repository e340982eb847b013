"""Why packets are dropped, as numbers and as text.

130 to 189 are Cilium's numbers and wording, so that its users and tools read ours; from 230 they
are our own. Four more reasons occur in cilia_metrics only and are no drops: 0, 100 to 102.
"""

from __future__ import annotations

from typing import Final

FORWARDED: Final = 0
ANSWERED_LOCALLY: Final = 100
IGNORED_BY_DESIGN: Final = 101
AUDITED: Final = 102

INVALID_SOURCE_IP: Final = 132
POLICY_DENIED: Final = 133
INVALID_PACKET: Final = 134
CT_INVALID_HEADER: Final = 135
FRAG_NEEDED: Final = 136
CT_UNKNOWN_PROTO: Final = 137
CT_CANNOT_CREATE: Final = 138
UNSUPPORTED_L3: Final = 139
MISSED_TAIL_CALL: Final = 140
WRITE_ERROR: Final = 141
UNKNOWN_L4: Final = 142
UNKNOWN_L3_TARGET: Final = 150
UNROUTABLE: Final = 151
CT_INSERT_FAILED: Final = 155
INVALID_EXTENSION_HEADER: Final = 156
FRAG_NOT_SUPPORTED: Final = 157
UNSUPPORTED_L2: Final = 166
NAT_NO_MAPPING: Final = 167
NAT_UNSUPPORTED_PROTO: Final = 168
FIB_LOOKUP_FAILED: Final = 169
INVALID_IDENTITY: Final = 171
UNKNOWN_SENDER: Final = 172
FRAG_NOT_FOUND: Final = 175
FORBIDDEN_ICMP6: Final = 176
SOCKET_LOOKUP_FAILED: Final = 178
SOCKET_ASSIGN_FAILED: Final = 179
PROXY_UNSUPPORTED_PROTO: Final = 180
POLICY_DENIED_BY_RULE: Final = 181

ARP_NOT_GATEWAY: Final = 230
TINY_FRAGMENT: Final = 231
OVERLAPPING_FRAGMENT: Final = 232
MULTICAST: Final = 233
FRAG_TABLE_FULL: Final = 234
ENDPOINT_NOT_OPEN: Final = 235
PROXY_MISSED: Final = 236
NO_PROXY_PAIR: Final = 237
OTHER_PROXY: Final = 238
NOT_THE_PROXY: Final = 239

_NOT_DROPS: Final[dict[int, str]] = {
    FORWARDED: "Forwarded",
    ANSWERED_LOCALLY: "Answered locally (ARP, neighbour discovery)",
    IGNORED_BY_DESIGN: "Ignored by design (DAD probe, MLD, router solicitation)",
    AUDITED: "Would be denied, only audited",
}

_TEXTS: Final[dict[int, str]] = {
    130: "Invalid source mac",
    131: "Invalid destination mac",
    132: "Invalid source ip",
    133: "Policy denied",
    134: "Invalid packet",
    135: "CT: Truncated or invalid header",
    136: "Fragmentation needed",
    137: "CT: Unknown L4 protocol",
    138: "CT: Can't create entry from packet",
    139: "Unsupported L3 protocol",
    140: "Missed tail call",
    141: "Error writing to packet",
    142: "Unknown L4 protocol",
    143: "Unknown ICMPv4 code",
    144: "Unknown ICMPv4 type",
    145: "Unknown ICMPv6 code",
    146: "Unknown ICMPv6 type",
    147: "Error retrieving tunnel key",
    148: "Error retrieving tunnel options",
    149: "Invalid Geneve option",
    150: "Unknown L3 target address",
    151: "Stale or unroutable IP",
    152: "No matching local container found",
    153: "Error while correcting L3 checksum",
    154: "Error while correcting L4 checksum",
    155: "CT: Map insertion failed",
    156: "Invalid IPv6 extension header",
    157: "IP fragmentation not supported",
    158: "Service backend not found",
    160: "No tunnel/encapsulation endpoint (datapath BUG!)",
    161: "Failed to insert into proxymap",
    162: "Reached EDT rate-limiting drop horizon",
    163: "Unknown connection tracking state",
    164: "Local host is unreachable",
    165: "No configuration available to perform policy decision",
    166: "Unsupported L2 protocol",
    167: "No mapping for NAT masquerade",
    168: "Unsupported protocol for NAT masquerade",
    169: "FIB lookup failed",
    170: "Encapsulation traffic is prohibited",
    171: "Invalid identity",
    172: "Unknown sender",
    173: "NAT not needed",
    174: "Is a ClusterIP",
    175: "First logical datagram fragment not found",
    176: "Forbidden ICMPv6 message",
    177: "Denied by LB src range check",
    178: "Socket lookup failed",
    179: "Socket assign failed",
    180: "Proxy redirection not supported for protocol",
    181: "Policy denied by denylist",
    182: "VLAN traffic disallowed by VLAN filter",
    183: "Incorrect VNI from VTEP",
    184: "Failed to update or lookup TC buffer",
    185: "No SID was found for the IP address",
    189: "Authentication required",
    ARP_NOT_GATEWAY: "ARP target is not the gateway",
    TINY_FRAGMENT: "Tiny fragment",
    OVERLAPPING_FRAGMENT: "Overlapping fragment",
    MULTICAST: "Multicast or broadcast not supported",
    FRAG_TABLE_FULL: "Fragment state table full or out of order",
    ENDPOINT_NOT_OPEN: "Endpoint is not open",
    PROXY_MISSED: "Marked for the proxy, but about to leave by a device",
    NO_PROXY_PAIR: "Both ends have L7 rules, and no listener for both is ready",
    OTHER_PROXY: "The connection began under other L7 rules; it has to be made anew",
    NOT_THE_PROXY: "End of a proxied connection, but not sent by the proxy",
}

DROP_REASONS: Final = tuple(_TEXTS)


def reason_text(reason: int) -> str:
    """The text of a reason of either sign; the number itself where it has none."""
    number = abs(reason)
    return _TEXTS.get(number) or _NOT_DROPS.get(number) or str(number)


def is_drop(reason: int) -> bool:
    """Whether a reason in cilia_metrics means that the packet was dropped."""
    return abs(reason) not in _NOT_DROPS
