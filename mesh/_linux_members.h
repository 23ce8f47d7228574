/* SPDX-License-Identifier: Apache-2.0 */
/* Structs and constants of the kernel's own interfaces, for `_linux.pyx`, from its headers. */
#ifndef MESH_LINUX_MEMBERS_H
#define MESH_LINUX_MEMBERS_H

#include "mesh/_layout.h"

#include <asm/socket.h>
#include <linux/bpf.h>
#include <linux/errqueue.h>
#include <linux/filter.h>
#include <linux/if.h>
#include <linux/if_arp.h>
#include <linux/if_ether.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/if_vlan.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/inet_diag.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/magic.h>
#include <linux/neighbour.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_conntrack_common.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/sock_diag.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#ifndef SOL_PACKET
#define SOL_PACKET 263 /* include/linux/socket.h, which is no header for user space */
#endif

/* ---- rtnetlink ---- */

static const struct mesh_member nlmsghdr_members[] = {
	HOST(nlmsghdr, nlmsg_len), HOST(nlmsghdr, nlmsg_type), HOST(nlmsghdr, nlmsg_flags),
	HOST(nlmsghdr, nlmsg_seq), HOST(nlmsghdr, nlmsg_pid),
};
static const struct mesh_member nlmsgerr_members[] = {
	HOST(nlmsgerr, error),
	STRUCT(nlmsgerr, msg, nlmsghdr),
};
static const struct mesh_member rtattr_members[] = {
	HOST(rtattr, rta_len),
	HOST(rtattr, rta_type),
};
static const struct mesh_member ifinfomsg_members[] = {
	HOST(ifinfomsg, ifi_family), HOST(ifinfomsg, ifi_type),   HOST(ifinfomsg, ifi_index),
	HOST(ifinfomsg, ifi_flags),  HOST(ifinfomsg, ifi_change),
};
static const struct mesh_member ifaddrmsg_members[] = {
	HOST(ifaddrmsg, ifa_family), HOST(ifaddrmsg, ifa_prefixlen), HOST(ifaddrmsg, ifa_flags),
	HOST(ifaddrmsg, ifa_scope),  HOST(ifaddrmsg, ifa_index),
};
static const struct mesh_member ndmsg_members[] = {
	HOST(ndmsg, ndm_family), HOST(ndmsg, ndm_ifindex), HOST(ndmsg, ndm_state),
	HOST(ndmsg, ndm_flags),  HOST(ndmsg, ndm_type),
};
static const struct mesh_member rtmsg_members[] = {
	HOST(rtmsg, rtm_family), HOST(rtmsg, rtm_dst_len), HOST(rtmsg, rtm_src_len),
	HOST(rtmsg, rtm_tos),    HOST(rtmsg, rtm_table),   HOST(rtmsg, rtm_protocol),
	HOST(rtmsg, rtm_scope),  HOST(rtmsg, rtm_type),    HOST(rtmsg, rtm_flags),
};
static const struct mesh_member ifla_vlan_flags_members[] = {
	HOST(ifla_vlan_flags, flags),
	HOST(ifla_vlan_flags, mask),
};

static const struct mesh_member nfgenmsg_members[] = {
	HOST(nfgenmsg, nfgen_family),
	HOST(nfgenmsg, version),
	NETWORK(nfgenmsg, res_id),
};

/* ---- sockets and programs ---- */

static const struct mesh_member inet_diag_sockid_members[] = {
	NETWORK(inet_diag_sockid, idiag_sport), NETWORK(inet_diag_sockid, idiag_dport),
	RAW(inet_diag_sockid, idiag_src),       RAW(inet_diag_sockid, idiag_dst),
	HOST(inet_diag_sockid, idiag_if),       RAW(inet_diag_sockid, idiag_cookie),
};
static const struct mesh_member inet_diag_req_v2_members[] = {
	HOST(inet_diag_req_v2, sdiag_family),
	HOST(inet_diag_req_v2, sdiag_protocol),
	HOST(inet_diag_req_v2, idiag_states),
	STRUCT(inet_diag_req_v2, id, inet_diag_sockid),
};
static const struct mesh_member inet_diag_msg_members[] = {
	HOST(inet_diag_msg, idiag_family),
	STRUCT(inet_diag_msg, id, inet_diag_sockid),
};

static const struct mesh_member sock_filter_members[] = {
	HOST(sock_filter, code),
	HOST(sock_filter, jt),
	HOST(sock_filter, jf),
	HOST(sock_filter, k),
};
static const struct mesh_member sock_fprog_members[] = {
	HOST(sock_fprog, len),
	POINTER(sock_fprog, filter),
};
static const struct mesh_member tcp_info_members[] = {
	HOST(tcp_info, tcpi_last_ack_recv),
};
static const struct mesh_member __sk_buff_members[] = {
	RAW(__sk_buff, cb),
};

/* ---- headers on the wire, without options (RFC 791, 8200, 9293, 768): the kernel's have bit fields ---- */

struct wire_ipv4 {
	__u8 version_words; /* version and length in words of 4 bytes, 4 bits each */
	__u8 traffic_class;
	__be16 length; /* of the packet */
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__be16 checksum;
	__u8 source[4];
	__u8 destination[4];
};
_Static_assert(sizeof(struct wire_ipv4) == sizeof(struct iphdr), "an IPv4 header");
_Static_assert(offsetof(struct wire_ipv4, ttl) == offsetof(struct iphdr, ttl), "wire_ipv4.ttl");
_Static_assert(offsetof(struct wire_ipv4, source) == offsetof(struct iphdr, saddr), "wire_ipv4.source");

struct wire_ipv6 {
	__be32 version_flow; /* version, traffic class and flow label: 4, 8 and 20 bits */
	__be16 length;       /* of what follows */
	__u8 protocol;
	__u8 hop_limit;
	__u8 source[16];
	__u8 destination[16];
};
_Static_assert(sizeof(struct wire_ipv6) == sizeof(struct ipv6hdr), "an IPv6 header");
_Static_assert(offsetof(struct wire_ipv6, protocol) == offsetof(struct ipv6hdr, nexthdr), "wire_ipv6.protocol");
_Static_assert(offsetof(struct wire_ipv6, source) == offsetof(struct ipv6hdr, saddr), "wire_ipv6.source");

struct wire_tcp {
	__be16 source;
	__be16 destination;
	__be32 sequence;
	__be32 acknowledged;
	__u8 words; /* length in words of 4 bytes, in the high 4 bits */
	__u8 flags;
	__be16 window;
	__be16 checksum;
	__be16 urgent;
};
_Static_assert(sizeof(struct wire_tcp) == sizeof(struct tcphdr), "a TCP header");
_Static_assert(offsetof(struct wire_tcp, acknowledged) == offsetof(struct tcphdr, ack_seq), "wire_tcp.acknowledged");
_Static_assert(offsetof(struct wire_tcp, window) == offsetof(struct tcphdr, window), "wire_tcp.window");

static const struct mesh_member ethhdr_members[] = {
	RAW(ethhdr, h_dest),
	RAW(ethhdr, h_source),
	NETWORK(ethhdr, h_proto),
};
static const struct mesh_member wire_ipv4_members[] = {
	HOST(wire_ipv4, version_words), HOST(wire_ipv4, traffic_class), NETWORK(wire_ipv4, length),
	NETWORK(wire_ipv4, id),         NETWORK(wire_ipv4, fragment),   HOST(wire_ipv4, ttl),
	HOST(wire_ipv4, protocol),      NETWORK(wire_ipv4, checksum),   RAW(wire_ipv4, source),
	RAW(wire_ipv4, destination),
};
static const struct mesh_member wire_ipv6_members[] = {
	NETWORK(wire_ipv6, version_flow), NETWORK(wire_ipv6, length), HOST(wire_ipv6, protocol),
	HOST(wire_ipv6, hop_limit),       RAW(wire_ipv6, source),     RAW(wire_ipv6, destination),
};
static const struct mesh_member wire_tcp_members[] = {
	NETWORK(wire_tcp, source),       NETWORK(wire_tcp, destination), NETWORK(wire_tcp, sequence),
	NETWORK(wire_tcp, acknowledged), HOST(wire_tcp, words),          HOST(wire_tcp, flags),
	NETWORK(wire_tcp, window),       NETWORK(wire_tcp, checksum),    NETWORK(wire_tcp, urgent),
};
static const struct mesh_member udphdr_members[] = {
	NETWORK(udphdr, source),
	NETWORK(udphdr, dest),
	NETWORK(udphdr, len),
	NETWORK(udphdr, check),
};

static const struct mesh_member sock_extended_err_members[] = {
	HOST(sock_extended_err, ee_errno),
};

/* A struct comes after those that are within it. */
static const struct mesh_layout linux_layouts[] = {
	LAYOUT(NlMsgHdr, nlmsghdr),
	LAYOUT(NlMsgErr, nlmsgerr),
	LAYOUT(RtAttr, rtattr),
	LAYOUT(IfInfoMsg, ifinfomsg),
	LAYOUT(IfAddrMsg, ifaddrmsg),
	LAYOUT(NdMsg, ndmsg),
	LAYOUT(RtMsg, rtmsg),
	LAYOUT(VlanFlags, ifla_vlan_flags),
	LAYOUT(DiagSocket, inet_diag_sockid),
	LAYOUT(DiagRequest, inet_diag_req_v2),
	LAYOUT(DiagMessage, inet_diag_msg),
	LAYOUT(NfGenMsg, nfgenmsg),
	LAYOUT(SockFilter, sock_filter),
	LAYOUT(SockFprog, sock_fprog),
	LAYOUT(TcpInfo, tcp_info),
	LAYOUT(SockExtendedErr, sock_extended_err),
	LAYOUT(SkBuff, __sk_buff),
	LAYOUT(EthHdr, ethhdr),
	LAYOUT(Ipv4, wire_ipv4),
	LAYOUT(Ipv6, wire_ipv6),
	LAYOUT(Tcp, wire_tcp),
	LAYOUT(Udp, udphdr),
	{NULL, NULL, 0, NULL, 0},
};

#define CONSTANT(name)                                                                                                 \
	{                                                                                                              \
		#name, name                                                                                            \
	}
static const struct mesh_constant linux_constants[] = {
	CONSTANT(IP_RECVERR),
	CONSTANT(IPV6_RECVERR),
	CONSTANT(NLM_F_REQUEST),
	CONSTANT(NLM_F_ACK),
	CONSTANT(NLM_F_DUMP),
	CONSTANT(NLM_F_CREATE),
	CONSTANT(NLMSG_ERROR),
	CONSTANT(NLMSG_DONE),
	CONSTANT(NLA_TYPE_MASK),
	CONSTANT(NETLINK_ROUTE),
	CONSTANT(NETLINK_SOCK_DIAG),
	CONSTANT(SOCK_DIAG_BY_FAMILY),
	CONSTANT(SOCK_DESTROY),
	CONSTANT(RTM_GETLINK),
	CONSTANT(RTM_GETADDR),
	CONSTANT(RTM_GETROUTE),
	CONSTANT(RTM_NEWNEIGH),
	CONSTANT(RTM_DELNEIGH),
	CONSTANT(RTM_GETNEIGH),
	CONSTANT(RTNLGRP_LINK),
	CONSTANT(RTNLGRP_NEIGH),
	CONSTANT(RTNLGRP_IPV4_IFADDR),
	CONSTANT(RTNLGRP_IPV4_ROUTE),
	CONSTANT(RTNLGRP_IPV4_RULE),
	CONSTANT(RTNLGRP_IPV6_IFADDR),
	CONSTANT(RTNLGRP_IPV6_ROUTE),
	CONSTANT(RTNLGRP_IPV6_RULE),
	CONSTANT(RTNLGRP_NEXTHOP),
	CONSTANT(RTNLGRP_TC),
	CONSTANT(NETLINK_NETFILTER),
	CONSTANT(NFPROTO_INET),
	CONSTANT(NFNLGRP_NFTABLES),
	CONSTANT(NFNL_SUBSYS_NFTABLES),
	CONSTANT(NFNL_SUBSYS_CTNETLINK),
	CONSTANT(NFT_MSG_GETRULE),
	CONSTANT(NFT_MSG_GETSETELEM),
	CONSTANT(NFTA_RULE_TABLE),
	CONSTANT(NFTA_RULE_USERDATA),
	CONSTANT(NFTA_SET_ELEM_LIST_TABLE),
	CONSTANT(NFTA_SET_ELEM_LIST_SET),
	CONSTANT(NFTA_SET_ELEM_LIST_ELEMENTS),
	CONSTANT(IPCTNL_MSG_CT_GET),
	CONSTANT(IPCTNL_MSG_CT_DELETE),
	CONSTANT(CTA_TUPLE_ORIG),
	CONSTANT(CTA_TUPLE_REPLY),
	CONSTANT(CTA_TUPLE_IP),
	CONSTANT(CTA_TUPLE_PROTO),
	CONSTANT(CTA_IP_V4_DST),
	CONSTANT(CTA_IP_V6_DST),
	CONSTANT(CTA_PROTO_NUM),
	CONSTANT(CTA_PROTO_SRC_PORT),
	CONSTANT(CTA_PROTO_DST_PORT),
	CONSTANT(CTA_STATUS),
	CONSTANT(CTA_ID),
	CONSTANT(CTA_FILTER),
	CONSTANT(CTA_FILTER_ORIG_FLAGS),
	CONSTANT(CTA_IP_V4_SRC),
	CONSTANT(CTA_IP_V6_SRC),
	CONSTANT(NLA_F_NESTED),
	CONSTANT(IPS_SEEN_REPLY),
	CONSTANT(IFLA_ADDRESS),
	CONSTANT(IFLA_IFNAME),
	CONSTANT(IFLA_MTU),
	CONSTANT(IFLA_MASTER),
	CONSTANT(IFLA_LINK_NETNSID),
	CONSTANT(IFLA_LINKINFO),
	CONSTANT(IFLA_INFO_KIND),
	CONSTANT(IFLA_INFO_DATA),
	CONSTANT(IFLA_VLAN_FLAGS),
	CONSTANT(VLAN_FLAG_REORDER_HDR),
	CONSTANT(IFA_ADDRESS),
	CONSTANT(IFA_LOCAL),
	CONSTANT(IFA_TARGET_NETNSID),
	CONSTANT(NETLINK_GET_STRICT_CHK),
	CONSTANT(NDA_DST),
	CONSTANT(NDA_LLADDR),
	CONSTANT(RTA_DST),
	CONSTANT(RTA_OIF),
	CONSTANT(RTA_GATEWAY),
	CONSTANT(RTA_PREFSRC),
	CONSTANT(RTA_METRICS),
	CONSTANT(RTAX_MTU),
	CONSTANT(RTN_LOCAL),
	CONSTANT(NUD_REACHABLE),
	CONSTANT(NUD_STALE),
	CONSTANT(NUD_DELAY),
	CONSTANT(NUD_PROBE),
	CONSTANT(NUD_NOARP),
	CONSTANT(NUD_PERMANENT),
	CONSTANT(NUD_FAILED),
	CONSTANT(NTF_USE),
	CONSTANT(IFF_UP),
	CONSTANT(IFF_LOOPBACK),
	CONSTANT(ARPHRD_ETHER),
	CONSTANT(ARPHRD_NONE),
	CONSTANT(ARPHRD_RAWIP),
	CONSTANT(ARPHRD_PPP),
	CONSTANT(ARPHRD_TUNNEL),
	CONSTANT(ARPHRD_TUNNEL6),
	CONSTANT(ARPHRD_SIT),
	CONSTANT(ARPHRD_IPGRE),
	CONSTANT(SO_ATTACH_FILTER),
	CONSTANT(SOL_PACKET),
	CONSTANT(PACKET_IGNORE_OUTGOING),
	CONSTANT(SO_NETNS_COOKIE),
	CONSTANT(CLONE_NEWNET),
	CONSTANT(ETH_P_ALL),
	CONSTANT(ETH_P_IP),
	CONSTANT(ETH_P_IPV6),
	CONSTANT(IP_MTU_DISCOVER),
	CONSTANT(IP_MTU),
	CONSTANT(IPV6_MTU_DISCOVER),
	CONSTANT(IPV6_MTU),
	CONSTANT(IP_PMTUDISC_PROBE),
	CONSTANT(BPF_FS_MAGIC),
	CONSTANT(BPF_LD),
	CONSTANT(BPF_W),
	CONSTANT(BPF_H),
	CONSTANT(BPF_B),
	CONSTANT(BPF_ABS),
	CONSTANT(BPF_JMP),
	CONSTANT(BPF_JEQ),
	CONSTANT(BPF_K),
	CONSTANT(BPF_RET),
	{NULL, 0},
};
#undef CONSTANT

#endif /* MESH_LINUX_MEMBERS_H */
