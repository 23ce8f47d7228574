/* SPDX-License-Identifier: Apache-2.0 */
/* Every struct and every constant of the contract by name, for `_abi.pyx`. Names and kinds only: where a member lies
 * and what a constant is worth, the compiler takes from the contract. tests/unit/test_abi.py misses what is left out.
 */
#ifndef MESH_ABI_MEMBERS_H
#define MESH_ABI_MEMBERS_H

#include "mesh/_layout.h"

#include "mesh/abi.h"
#include "mesh/geneve.h"

static const struct mesh_member mesh_flow_members[] = {
	ADDRESS(mesh_flow, source),           ADDRESS(mesh_flow, destination), NETWORK(mesh_flow, source_port),
	NETWORK(mesh_flow, destination_port), HOST(mesh_flow, protocol),
};
static const struct mesh_member mesh_slot_members[] = {
	HOST(mesh_slot, current),
	HOST(mesh_slot, previous),
};
static const struct mesh_member mesh_table_members[] = {
	HOST(mesh_table, first),
	HOST(mesh_table, size),
};
static const struct mesh_member mesh_frontend_members[] = {
	STRUCT(mesh_frontend, table, mesh_table),
	HOST(mesh_frontend, flags),
	HOST(mesh_frontend, acl),
};
static const struct mesh_member mesh_frontend_key_members[] = {
	ADDRESS(mesh_frontend_key, address),
	NETWORK(mesh_frontend_key, port),
	HOST(mesh_frontend_key, protocol),
};
static const struct mesh_member mesh_backend_members[] = {
	ADDRESS(mesh_backend, address), NETWORK(mesh_backend, port), HOST(mesh_backend, protocol),
	HOST(mesh_backend, state),      HOST(mesh_backend, epoch),   HOST(mesh_backend, ifindex),
	HOST(mesh_backend, bridge),     RAW(mesh_backend, mac),      HOST(mesh_backend, version),
	HOST(mesh_backend, handed),     RAW(mesh_backend, seed),     HOST(mesh_backend, frontend),
	HOST(mesh_backend, networks),
};
static const struct mesh_member mesh_network_key_members[] = {
	HOST(mesh_network_key, bits),
	HOST(mesh_network_key, owner),
	ADDRESS(mesh_network_key, client),
};
static const struct mesh_member mesh_acl_key_members[] = {
	HOST(mesh_acl_key, bits),
	HOST(mesh_acl_key, acl),
	ADDRESS(mesh_acl_key, source),
};
static const struct mesh_member mesh_note_members[] = {
	HOST(mesh_note, owner),
	HOST(mesh_note, epoch),
	HOST(mesh_note, stamp),
	HOST(mesh_note, frontend),
};
static const struct mesh_member mesh_revnat_members[] = {
	ADDRESS(mesh_revnat, called),      ADDRESS(mesh_revnat, client), NETWORK(mesh_revnat, called_port),
	HOST(mesh_revnat, flags),          HOST(mesh_revnat, ifindex),   HOST(mesh_revnat, frontend),
	NETWORK(mesh_revnat, client_port), HOST(mesh_revnat, owner),     HOST(mesh_revnat, epoch),
	HOST(mesh_revnat, stamp),          HOST(mesh_revnat, sequence),  HOST(mesh_revnat, veth),
};
static const struct mesh_member mesh_counts_members[] = {
	HOST(mesh_counts, packets_in), HOST(mesh_counts, bytes_in), HOST(mesh_counts, packets_out),
	HOST(mesh_counts, bytes_out),  HOST(mesh_counts, starts),   HOST(mesh_counts, ends),
};
static const struct mesh_member mesh_failures_members[] = {
	HOST(mesh_failures, denied),     HOST(mesh_failures, no_backend), HOST(mesh_failures, refused),
	HOST(mesh_failures, too_big),    HOST(mesh_failures, no_path),    HOST(mesh_failures, collision),
	HOST(mesh_failures, unanswered),
};
static const struct mesh_member mesh_config_members[] = {
	HOST(mesh_config, netns_cookie), ADDRESS(mesh_config, hairpin),     ADDRESS(mesh_config, hairpin6),
	HOST(mesh_config, settings),     NETWORK(mesh_config, tunnel_port), HOST(mesh_config, error_rate),
	HOST(mesh_config, clock),
};
static const struct mesh_member mesh_fragment_key_members[] = {
	ADDRESS(mesh_fragment_key, source),
	ADDRESS(mesh_fragment_key, destination),
	NETWORK(mesh_fragment_key, id),
	HOST(mesh_fragment_key, protocol),
};
static const struct mesh_member mesh_fragment_members[] = {
	NETWORK(mesh_fragment, source_port),
	NETWORK(mesh_fragment, destination_port),
	HOST(mesh_fragment, stamp),
};
static const struct mesh_member mesh_udp_peer_members[] = {
	HOST(mesh_udp_peer, cookie),
	ADDRESS(mesh_udp_peer, address),
	NETWORK(mesh_udp_peer, port),
};
static const struct mesh_member mesh_sk_revnat_members[] = {
	ADDRESS(mesh_sk_revnat, called),       ADDRESS(mesh_sk_revnat, backend), NETWORK(mesh_sk_revnat, called_port),
	NETWORK(mesh_sk_revnat, backend_port), HOST(mesh_sk_revnat, owner),      HOST(mesh_sk_revnat, epoch),
	HOST(mesh_sk_revnat, frontend),
};
static const struct mesh_member mesh_id_members[] = {
	RAW(mesh_id, seed),
	NETWORK(mesh_id, port),
	HOST(mesh_id, protocol),
	HOST(mesh_id, flags),
};
static const struct mesh_member mesh_geneve_members[] = {
	HOST(mesh_geneve, words),        HOST(mesh_geneve, flags),           NETWORK(mesh_geneve, inner),
	NETWORK(mesh_geneve, vni),       NETWORK(mesh_geneve, option_class), HOST(mesh_geneve, option_type),
	HOST(mesh_geneve, option_words), STRUCT(mesh_geneve, id, mesh_id),
};
static const struct mesh_member mesh_proof_members[] = {
	NETWORK(mesh_proof, key),
	NETWORK(mesh_proof, epoch),
	RAW(mesh_proof, mac),
};
static const struct mesh_member mesh_sip_key_members[] = {
	HOST(mesh_sip_key, first),
	HOST(mesh_sip_key, second),
};
static const struct mesh_member mesh_node_key_members[] = {
	NETWORK(mesh_node_key, name),
	HOST(mesh_node_key, valid),
	STRUCT(mesh_node_key, sent, mesh_sip_key),
	STRUCT(mesh_node_key, taken, mesh_sip_key),
};
static const struct mesh_member mesh_node_members[] = {
	ADDRESS(mesh_node, source), HOST(mesh_node, ifindex),    HOST(mesh_node, mtu),  HOST(mesh_node, id),
	HOST(mesh_node, path_mtu),  HOST(mesh_node, path_stamp), HOST(mesh_node, hint), HOST(mesh_node, flags),
	HOST(mesh_node, heard),     HOST(mesh_node, unproven),   RAW(mesh_node, keys),
};

/* A struct comes after those that are within it. */
static const struct mesh_layout mesh_layouts[] = {
	LAYOUT(Flow, mesh_flow),
	LAYOUT(Slot, mesh_slot),
	LAYOUT(Table, mesh_table),
	LAYOUT(Frontend, mesh_frontend),
	LAYOUT(FrontendKey, mesh_frontend_key),
	LAYOUT(Backend, mesh_backend),
	LAYOUT(NetworkKey, mesh_network_key),
	LAYOUT(AclKey, mesh_acl_key),
	LAYOUT(Note, mesh_note),
	LAYOUT(Revnat, mesh_revnat),
	LAYOUT(Counts, mesh_counts),
	LAYOUT(Failures, mesh_failures),
	LAYOUT(Config, mesh_config),
	LAYOUT(FragmentKey, mesh_fragment_key),
	LAYOUT(Fragment, mesh_fragment),
	LAYOUT(UdpPeer, mesh_udp_peer),
	LAYOUT(SkRevnat, mesh_sk_revnat),
	LAYOUT(Id, mesh_id),
	LAYOUT(Geneve, mesh_geneve),
	LAYOUT(Proof, mesh_proof),
	LAYOUT(SipKey, mesh_sip_key),
	LAYOUT(NodeKey, mesh_node_key),
	LAYOUT(Node, mesh_node),
	{NULL, NULL, 0, NULL, 0},
};

#define MESH_VERDICT_TEXT(name, help) {#name, help},
static const struct mesh_verdict_text {
	const char *name, *help;
} mesh_verdict_texts[] = {MESH_VERDICTS(MESH_VERDICT_TEXT){NULL, NULL}};
#undef MESH_VERDICT_TEXT

#define MESH_TABLE_SIZE_ITEM(size) size,
static const uint32_t mesh_table_sizes[] = {MESH_TABLE_SIZES(MESH_TABLE_SIZE_ITEM) 0};
#undef MESH_TABLE_SIZE_ITEM

/* What user space stores as one aligned word, so that programs see all of it or nothing (maps.h). */
#define MESH_WORD_OF(s, f) (offsetof(struct s, f) / 8)
_Static_assert(offsetof(struct mesh_frontend, table) % 8 == 0 && sizeof(struct mesh_table) == 8, "a table is one word");
_Static_assert(MESH_WORD_OF(mesh_frontend, flags) == MESH_WORD_OF(mesh_frontend, acl), "options are one word");
_Static_assert(MESH_WORD_OF(mesh_backend, port) == MESH_WORD_OF(mesh_backend, protocol) &&
		       MESH_WORD_OF(mesh_backend, port) == MESH_WORD_OF(mesh_backend, state) &&
		       MESH_WORD_OF(mesh_backend, port) == MESH_WORD_OF(mesh_backend, epoch),
	       "port, protocol, state and epoch of a backend are one word");
#define MESH_FRONTEND_TABLE_WORD   offsetof(struct mesh_frontend, table)
#define MESH_FRONTEND_OPTIONS_WORD (MESH_WORD_OF(mesh_frontend, flags) * 8)
#define MESH_BACKEND_STATE_WORD    (MESH_WORD_OF(mesh_backend, state) * 8)

/* A longest-prefix match takes the length from the first 4 bytes, and compares what follows from its beginning. */
_Static_assert(offsetof(struct mesh_acl_key, bits) == 0 && offsetof(struct mesh_acl_key, acl) == 4 &&
		       offsetof(struct mesh_acl_key, source) == 8,
	       "mesh_acl_key is a key of BPF_MAP_TYPE_LPM_TRIE");
#define MESH_ACL_KEY_RULE_BITS (8 * (offsetof(struct mesh_acl_key, source) - offsetof(struct mesh_acl_key, acl)))
_Static_assert(offsetof(struct mesh_network_key, bits) == 0 && offsetof(struct mesh_network_key, owner) == 4 &&
		       offsetof(struct mesh_network_key, client) == 8,
	       "mesh_network_key is one, too, and counts alike");

#define CONSTANT(name)                                                                                                 \
	{                                                                                                              \
		#name, MESH_##name                                                                                     \
	}
static const struct mesh_constant mesh_constants[] = {
	CONSTANT(ABI_VERSION),
	/* owners and slots */
	CONSTANT(OWNER_NONE),
	CONSTANT(OWNER_PASS),
	CONSTANT(OWNER_FIRST),
	CONSTANT(OWNER_MASK),
	CONSTANT(SLOT_TRACKED),
	CONSTANT(AFFINITY_FLOW),
	CONSTANT(AFFINITY_CLIENT),
	/* limits */
	CONSTANT(TABLE_SIZE_DEFAULT),
	CONSTANT(MAX_BACKENDS),
	CONSTANT(MAX_FRONTENDS),
	CONSTANT(MAX_ARENAS),
	CONSTANT(MAX_NODES),
	CONSTANT(ARENA_BITS),
	CONSTANT(ARENA_SLOTS),
	/* ports, frontends, backends, source rules, settings */
	CONSTANT(PORT_EXACT),
	CONSTANT(PORT_TUNNEL),
	CONSTANT(PORT_NODES),
	CONSTANT(PORT_FRONTEND),
	CONSTANT(PORT_TCP),
	CONSTANT(PORT_UDP),
	CONSTANT(FRONTEND_CLIENT),
	CONSTANT(FRONTEND_DENY),
	CONSTANT(FRONTEND_PASS_IF_NONE),
	CONSTANT(FRONTEND_HOLD),
	CONSTANT(BACKEND_FREE),
	CONSTANT(BACKEND_ACTIVE),
	CONSTANT(BACKEND_DRAINING),
	CONSTANT(LOOPBACK),
	CONSTANT(NAMED),
	CONSTANT(NAMED_MASK),
	CONSTANT(ACL_ALLOW),
	CONSTANT(ACL_DENY),
	CONSTANT(SETTING_DIRECT),
	CONSTANT(SETTING_GUARD),
	CONSTANT(SETTING_LEAVING),
	CONSTANT(PASS_MARK),
	CONSTANT(ADDRESS_OWN),
	CONSTANT(ADDRESS_FLOATING),
	/* the flow cache and the reverse translation */
	CONSTANT(STAMP_SHIFT),
	CONSTANT(ORPHAN_NEVER),
	CONSTANT(ORPHAN_UDP),
	CONSTANT(NOTE_ASKED),
	CONSTANT(REVNAT_PEER),
	CONSTANT(REVNAT_HAIRPIN),
	CONSTANT(REVNAT_FIN_IN),
	CONSTANT(REVNAT_FIN_OUT),
	CONSTANT(REVNAT_OPENED),
	CONSTANT(REVNAT_REFUSED),
	CONSTANT(REVNAT_ANSWERED),
	CONSTANT(REVNAT_UNANSWERED),
	CONSTANT(REVNAT_TRANSLATED),
	CONSTANT(REVNAT_NODE),
	/* the tunnel */
	CONSTANT(TUNNEL_REPLY),
	CONSTANT(TRIAL_ADDRESS),
	CONSTANT(TUNNEL_ASK),
	CONSTANT(TUNNEL_BACK),
	CONSTANT(GENEVE_WORDS),
	CONSTANT(GENEVE_CRITICAL),
	CONSTANT(GENEVE_CLASS),
	CONSTANT(GENEVE_TYPE),
	CONSTANT(GENEVE_OPTION),
	CONSTANT(PROOF_WORDS),
	CONSTANT(EPOCH_SHIFT),
	CONSTANT(EPOCH_WINDOW),
	CONSTANT(HEARD_LIFE),
	CONSTANT(NODE_KEYS),
	CONSTANT(NODE_PROVE),
	CONSTANT(NODE_DEMAND),
	CONSTANT(TUNNEL_PORT),
	CONSTANT(TUNNEL_SOURCE),
	CONSTANT(PATH_LIFE),
	/* what mesh_explain answers, by word */
	CONSTANT(EXPLAIN_VERDICT),
	CONSTANT(EXPLAIN_FRONTEND),
	CONSTANT(EXPLAIN_HASH),
	CONSTANT(EXPLAIN_SLOT),
	CONSTANT(EXPLAIN_OWNER),
	CONSTANT(VERDICT_COUNT),
	/* what follows from the layouts */
	CONSTANT(FRONTEND_TABLE_WORD),
	CONSTANT(FRONTEND_OPTIONS_WORD),
	CONSTANT(BACKEND_STATE_WORD),
	CONSTANT(ACL_KEY_RULE_BITS),
	{NULL, 0},
};
#undef CONSTANT

#endif /* MESH_ABI_MEMBERS_H */
