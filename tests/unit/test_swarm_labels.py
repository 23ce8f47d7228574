# SPDX-License-Identifier: Apache-2.0
"""Labels -> options: what is accepted, what is said about the rest."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model import Affinity, HealthCheck, Locality, ProbeKind, ProxyProtocol, ServiceOptions, Severity
from mesh.providers.labels import KEYS, Accepted, misplaced, node_weight, parse_options, service_options
from mesh.rules import NOBODY


def test_no_labels_are_the_defaults() -> None:
    assert service_options("web", {})[:2] == (ServiceOptions(), [])
    assert service_options("web", {"traefik.enable": "true", "meshed": "x"})[:2] == (ServiceOptions(), [])


def test_what_somebody_wrote_is_shown_at_a_length_that_fits() -> None:
    _, problems = service_options("web", {"mesh." + "x" * 300: "y" * 5000, "mesh.affinity": "z" * 5000})[:2]
    assert len(problems) == 2 and all(len(str(problem)) < 350 for problem in problems)
    _, problems = node_weight("n1", {"mesh." + "x" * 300: "0"})
    assert len(str(problems[0])) < 200


def test_every_label() -> None:
    labels = {
        "mesh.enable": "false",
        "mesh.affinity": "client-ip",
        "mesh.proxy-protocol": "v2",
        "mesh.health": "http:/ready?full=1",
        "mesh.health.interval": "500ms",
        "mesh.health.timeout": "0.2s",
        "mesh.health.rise": "1",
        "mesh.health.fall": "5",
        "mesh.table-size": "65537",
        "mesh.locality": "local-first",
        "mesh.allow": "10.0.0.0/8, 2001:db8::/32",
        "mesh.deny": "10.1.2.3",
        "mesh.fail-closed": "true",
    }
    assert {k.removeprefix("mesh.") for k in labels} == set(KEYS)
    options, problems = service_options("web", labels)[:2]
    assert not problems
    assert options == ServiceOptions(
        enable=False,
        affinity=Affinity.CLIENT_IP,
        proxy_protocol=ProxyProtocol.V2,
        health=HealthCheck(ProbeKind.HTTP, "/ready?full=1", 0.5, 0.2, 1, 5),
        table_size=65537,
        locality=Locality.LOCAL_FIRST,
        allow=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32")),
        deny=(ipaddress.ip_network("10.1.2.3/32"),),
        fail_closed=True,
    )


@pytest.mark.parametrize(
    ("text", "kind", "path"),
    [
        ("tcp", ProbeKind.TCP, "/"),
        ("off", ProbeKind.OFF, "/"),
        ("http", ProbeKind.HTTP, "/"),
        ("http:/", ProbeKind.HTTP, "/"),
    ],
)
def test_probes(text: str, kind: ProbeKind, path: str) -> None:
    options, problems = service_options("web", {"mesh.health": text})[:2]
    assert (options.health.kind, options.health.path, problems) == (kind, path, [])


@pytest.mark.parametrize(
    ("label", "value", "said"),
    [
        ("mesh.enable", "maybe", "true, false"),
        ("mesh.affinity", "sticky", "one of: client-ip, flow"),
        ("mesh.affinity", "", "one of: client-ip, flow"),
        ("mesh.proxy-protocol", "v1", "one of: off, v2"),
        ("mesh.health", "http:ready", "one of: tcp, http:/path, off"),
        ("mesh.health", "http:/a b", "http:/path"),
        ("mesh.health", "tcp:80", "http:/path"),
        ("mesh.health.interval", "2", "such as 2s or 500ms"),
        ("mesh.health.interval", "1ms", "0.1s to 3600s"),
        ("mesh.health.rise", "0", "from 1 to 100"),
        ("mesh.health.fall", "-1", "from 1 to 100"),
        ("mesh.table-size", "1000", "1021, 4093, 16381, 65537, 655373"),
        ("mesh.locality", "zone", "cluster, local-first"),
        ("mesh.afinity", "flow", "did you mean mesh.affinity?"),
        ("mesh.health-interval", "2s", "did you mean mesh.health.interval?"),
        ("mesh.zzz", "1", "known: mesh.enable, mesh.affinity"),
        ("mesh.weight", "1", "label of nodes"),
        ("mesh.weigth", "1", "did you mean mesh.weight? That is a label of nodes"),
    ],
)
def test_a_wrong_label_is_one_message_and_the_default(label: str, value: str, said: str) -> None:
    options, (problem,) = service_options("web", {label: value})[:2]
    assert options == ServiceOptions()
    assert problem.where == f"service web, label {label}"
    assert said in str(problem)
    assert value in str(problem) or "label" in problem.message


def test_one_wrong_label_leaves_the_others() -> None:
    options, problems = service_options("web", {"mesh.affinity": "client-ip", "mesh.table-size": "7"})[:2]
    assert options.affinity is Affinity.CLIENT_IP
    assert len(problems) == 1


def test_a_wrong_allow_opens_nothing() -> None:
    options, problems = service_options("web", {"mesh.allow": "10.0.0.0/8, 10.0.0.300"})[:2]
    assert options.allow == (ipaddress.ip_network("10.0.0.0/8"),)
    assert len(problems) == 1
    options, problems = service_options("web", {"mesh.allow": "intranet", "mesh.deny": "10.0.0.1"})[:2]
    assert {n.prefixlen for n in options.deny} == {0}
    assert {n.version for n in options.deny} == {4, 6}
    assert "nobody is let in" in str(problems[0])


def test_a_rule_without_any_good_value_lets_nobody_in_and_is_critical() -> None:
    for labels in ({"mesh.deny": "10.0.0.0/33"}, {"mesh.deny": "10.0.0.1, x"}, {"mesh.allow": "10.77.0.0/33"}):
        options, problems, accepted = service_options("web", labels)
        assert (options.allow, options.deny) == ((), NOBODY)
        assert "is not a network such as 10.0.0.0/8" in str(problems[0]) and "nobody is let in" in str(problems[0])
        assert {problem.severity for problem in problems} == {Severity.CRITICAL}
        # nor does the next read take it for good
        assert service_options("web", labels, accepted)[0] == options


@pytest.mark.parametrize("value", ["", "  ", ","])
def test_an_empty_allow_admits_nobody_and_is_named(value: str) -> None:
    """A variable that was not set: `mesh.allow=${OFFICE}`."""
    options, (problem,), accepted = service_options("web", {"mesh.allow": value, "mesh.deny": "10.0.0.1"})
    assert options.deny == NOBODY
    assert problem.where == "service web, label mesh.allow" and problem.severity is Severity.CRITICAL
    assert "is empty: " not in str(problem) and "is empty (nobody is let in" in str(problem)
    options, (problem,), _ = service_options("web", {"mesh.allow": "10.0.0.0/33"}, accepted)
    assert options.deny == NOBODY and problem.severity is Severity.CRITICAL


def test_fail_closed_admits_nobody_but_those_whom_an_allow_names() -> None:
    """A name that was misspelt is no rule: `mesh.allowed`."""
    options, problems, accepted = service_options("web", {"mesh.fail-closed": "true", "mesh.allowed": "10.0.0.0/8"})
    assert options.deny == NOBODY and options.fail_closed
    assert "nobody is" in str(problems[0]) and problems[0].severity is Severity.CRITICAL
    labels = {"mesh.fail-closed": "true", "mesh.allow": "10.0.0.0/8"}
    options, problems, accepted = service_options("web", labels, accepted)
    assert (options.allow, options.deny, problems) == ((ipaddress.ip_network("10.0.0.0/8"),), (), [])
    options, (problem,), _ = service_options("web", {"mesh.fail-closed": "maybe"})
    assert options.deny == NOBODY and problem.severity is Severity.CRITICAL
    assert service_options("web", {"mesh.fail-closed": "false"})[:2] == (ServiceOptions(), [])


GOOD = {
    "mesh.enable": "false", "mesh.affinity": "client-ip", "mesh.proxy-protocol": "v2", "mesh.health": "http:/ready",
    "mesh.health.interval": "500ms", "mesh.health.timeout": "0.2s", "mesh.health.rise": "1", "mesh.health.fall": "5",
    "mesh.table-size": "65537", "mesh.locality": "local-first", "mesh.allow": "10.0.0.0/8, 2001:db8::/32",
    "mesh.deny": "10.1.2.3",
}  # fmt: skip


@pytest.mark.parametrize("label", sorted(GOOD))
def test_a_wrong_value_of_any_label_keeps_the_last_good_one(label: str) -> None:
    before, _, accepted = service_options("web", GOOD)
    for value in ("?", "10.77.0.0/33"):  # again and again: the last good one is not forgotten by the first wrong one
        after, (problem,), accepted = service_options("web", {**GOOD, label: value}, accepted)
        assert after == before
        assert f"{GOOD[label]!r} stays in force" in problem.remedy
        assert problem.severity is (Severity.CRITICAL if label in ("mesh.allow", "mesh.deny") else Severity.WARNING)
    assert service_options("web", {**GOOD, label: GOOD[label]}, accepted)[:2] == (before, [])


@pytest.mark.parametrize("label", sorted(GOOD))
def test_a_label_that_was_not_set_and_is_wrong_now_changes_nothing(label: str) -> None:
    _, _, accepted = service_options("web", {})
    options, (problem,), accepted = service_options("web", {label: "10.77.0.0/33"}, accepted)
    assert options == ServiceOptions() and "counts as not set" in problem.remedy
    assert (": everybody is let in" in problem.remedy) == (label == "mesh.allow")
    assert service_options("web", {label: "?"}, accepted)[0] == ServiceOptions()


def test_a_label_that_is_removed_is_not_kept() -> None:
    _, _, accepted = service_options("web", GOOD)
    options, _, accepted = service_options("web", {}, accepted)
    assert options == ServiceOptions() and accepted == Accepted()
    assert service_options("web", {"mesh.allow": "x"}, accepted)[0] == ServiceOptions()


def test_what_another_build_kept_and_this_one_cannot_use_is_no_last_good_value() -> None:
    options, _, _ = service_options("web", {"mesh.allow": "x"}, Accepted({"allow": "office"}))
    assert options.deny == NOBODY


@pytest.mark.parametrize(("text", "weight", "wrong"), [("0", 0, 0), ("65535", 65535, 0), ("65536", 1, 1), ("x", 1, 1)])
def test_node_weight(text: str, weight: int, wrong: int) -> None:
    found, problems = node_weight("n1", {"mesh.weight": text, "rack": "7"})
    assert (found, len(problems)) == (weight, wrong)
    assert node_weight("n1", {"mesh.weight": text}, 0)[0] == (0 if wrong else weight)  # drained, then mistyped


def test_node_labels_that_belong_elsewhere() -> None:
    weight, (problem,) = node_weight("n1", {"mesh.affinity": "flow"})
    assert weight == 1
    assert "node n1, label mesh.affinity" in str(problem)


@given(
    st.dictionaries(
        st.sampled_from([*KEYS, "weight", "x"]).map(lambda k: f"mesh.{k}") | st.text(),
        st.text()
        | st.from_regex(r"-?\d{0,30}(ms|s|m|h)?", fullmatch=True)
        | st.sampled_from(["tcp", "http:/", "http:", "٣s", "²", "10.0.0.0/8", "::/0,,"]),
    )
)
def test_any_labels_give_options(labels: dict[str, str]) -> None:
    options, problems = service_options("web", labels)[:2]
    assert options.health.interval >= 0.1
    assert options.health.rise >= 1
    assert all(str(p) for p in problems)
    node_weight("n1", labels)


CLOSING = ("deny", "fail-closed")  # a wrong value of these is no absent one


@given(st.dictionaries(st.sampled_from(KEYS), st.text(max_size=5)))
def test_what_is_not_refused_is_kept(values: dict[str, str]) -> None:
    """A value that was refused equals no value."""
    options, problems = parse_options(values, lambda key: key)
    wrong = {p.where for p in problems}
    if "allow" not in wrong:
        assert parse_options({k: v for k, v in values.items() if k not in wrong or k in CLOSING}, str)[0] == options


@pytest.mark.parametrize(
    ("label", "meant", "severity"),
    [
        ("mesh.afinity", "mesh.affinity", Severity.WARNING),
        ("mesh.allowed", "mesh.allow", Severity.CRITICAL),
        ("mesh.allows", "mesh.allow", Severity.CRITICAL),
        ("mesh.Allow", "mesh.allow", Severity.CRITICAL),
        ("Mesh.deny", "mesh.deny", Severity.CRITICAL),
        ("mesh_fail_closed", "mesh.fail-closed", Severity.CRITICAL),
        ("mesh-allow", "mesh.allow", Severity.CRITICAL),
        ("MESH/locality", "mesh.locality", Severity.WARNING),
    ],
)
def test_a_label_that_is_nearly_ours_is_named(label: str, meant: str, severity: Severity) -> None:
    """With the one that was meant; it is critical where somebody believes in a rule that nobody keeps."""
    options, problems, accepted = service_options("web", {label: "10.0.0.0/8"})
    assert (options, accepted) == (ServiceOptions(), Accepted())
    assert [(p.where, p.remedy, p.severity) for p in problems] == [
        (f"service web, label {label}", f"did you mean {meant}?", severity)
    ]
    if severity is Severity.CRITICAL:  # the rule itself is there: nobody relies on the other
        problems = service_options("web", {label: "10.0.0.0/8", meant: "true"})[1]
        assert severity not in [p.severity for p in problems if p.where.endswith(label)]


@pytest.mark.parametrize("label", ["mesh", "meshery.allow", "mesh-team.allow", "com.mesh.allow", "mesh-allow-list"])
def test_other_peoples_labels_are_left_alone(label: str) -> None:
    assert service_options("web", {label: "x"})[:2] == (ServiceOptions(), [])


def test_a_rule_on_containers_alone_is_critical() -> None:
    """It is in force nowhere."""
    labels = {"mesh.allow": "10.0.0.0/8", "mesh.affinity": "flow"}
    found = {p.where.rpartition(" ")[2]: p.severity for p in misplaced("web", {}, labels)}
    assert found == {"mesh.allow": Severity.CRITICAL, "mesh.affinity": Severity.WARNING}
    assert misplaced("web", labels, labels) == []
