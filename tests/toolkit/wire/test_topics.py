import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from fedprune.core.errors import ProtocolError
from fedprune.wire.topics import TopicParts, Topics

pytestmark = pytest.mark.board

names = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True).filter(lambda n: n not in (".", "..", "all", "-"))


@given(names, names, names | st.just("-"))
def test_every_topic_is_heard_by_the_right_side_only_and_read_back(site: str, device: str, job: str) -> None:
    topics = Topics(site)
    second_device = "y" if device == "x" else "x"
    for topic, channel in [
        (topics.up(device, job), "up"),
        (topics.up_blob(device, job), "up/blob"),
        (topics.down(device, job), "down"),
        (topics.down_blob(device, job), "down/blob"),
    ]:
        assert topics.parse(topic) == TopicParts(device, job, channel)
        listeners = [topics.server_subscriptions(), *map(topics.device_subscriptions, (device, second_device))]
        heard = [any(topic_matches_sub(s, topic) for s in subscriptions) for subscriptions in listeners]
        assert heard == [channel.startswith("up"), channel.startswith("down"), False]


@given(names, names, st.from_regex(r"[0-9a-f]{32}", fullmatch=True))
def test_requests_to_join_are_heard_by_who_lets_in_and_answers_by_who_asked(site: str, device: str, nonce: str) -> None:
    topics = Topics(site)
    asked, answered = topics.join_request(nonce), topics.join_answer(nonce)

    assert topics.parse_join(asked) == nonce
    assert topic_matches_sub(topics.join_subscription(), asked)
    for subscription in (*topics.server_subscriptions(), *topics.device_subscriptions(device)):
        assert not any(topic_matches_sub(subscription, t) for t in (asked, answered))
    assert not topic_matches_sub(topics.join_subscription(), answered)


@pytest.mark.parametrize(
    "topic",
    [
        "fedprune/1/lab/pi-1/-/join",
        "fedprune/1/other/" + "a" * 32 + "/-/join",
        "fedprune/1/lab/" + "a" * 32 + "/job/join",
    ],
)
def test_a_topic_that_nobody_asks_on_is_an_error(topic: str) -> None:
    with pytest.raises(ProtocolError):
        Topics("lab").parse_join(topic)


def test_a_broadcast_reaches_every_device_and_not_the_server() -> None:
    topics = Topics("lab")

    assert topics.broadcast() == "fedprune/1/lab/all/-/down"
    assert topics.parse(topics.broadcast()) == TopicParts("all", "-", "down")
    assert any(topic_matches_sub(s, topics.broadcast()) for s in topics.device_subscriptions("pi-1"))
    assert not any(topic_matches_sub(s, topics.broadcast()) for s in topics.server_subscriptions())


@pytest.mark.parametrize("name", ["", "a/b", "+", "a" * 65, "..", "a\n"])
def test_names_that_mean_something_to_mqtt_or_to_a_file_system_are_refused(name: str) -> None:
    topics = Topics("lab")
    for make in (lambda: Topics(name), lambda: topics.up(name), lambda: topics.down("pi-1", name)):
        with pytest.raises(ProtocolError, match="a name of 1 to 64"):
            make()


@pytest.mark.parametrize(
    "topic",
    [
        "fedprune/1/lab/pi/j",
        "fedprune/2/lab/pi/j/up",
        "fedprune/1/other/pi/j/up",
        "fedprune/1/lab/pi/j/sideways",
        "fedprune/1/lab/../j/up",
        "x" * 60_000,
    ],
    ids=lambda t: t[:40],
)
def test_foreign_topics_are_refused(topic: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Topics("lab").parse(topic)
    assert len(str(caught.value)) < 400
