import torch
from torch import nn

from bridge import fingerprint
from tests.bridge.fakes import pairs, sentences, text_instance


def digest(instances, collated=None):
    starts = range(0, len(instances), fingerprint.CHUNK)
    return fingerprint.of_chunks(fingerprint.of_rows(instances, collated, starts))


def test_every_row_every_bit_and_the_order_count():
    rows = pairs(5)
    x, y = rows[3]
    same = [(x.clone(), y) for x, y in rows]
    assert digest(same) == digest(rows)
    others = [
        rows[:4],
        [*rows[:3], rows[4], rows[3]],
        [*rows[:3], (torch.nextafter(x, x + 1), y), rows[4]],
        [*rows[:3], (x, 1 - y), rows[4]],
        [*rows[:3], (x.float(), y), rows[4]],
        [*rows[:3], (x.reshape(2, 2), y), rows[4]],
        [{"x": x, "y": y} for x, y in rows],
    ]
    assert len({digest(other) for other in [rows, *others]}) == len(others) + 1


def test_the_digest_does_not_depend_on_who_read_which_chunk(monkeypatch):
    monkeypatch.setattr(fingerprint, "CHUNK", 4)
    rows = pairs(10)
    starts = range(0, 10, 4)
    by_two = fingerprint.of_rows(rows, None, starts[1:]) | fingerprint.of_rows(rows, None, starts[:1])
    assert fingerprint.of_chunks(by_two) == digest(rows)


def test_instances_of_unknown_kind_are_told_by_what_they_are_collated_to():
    words = [text_instance(*row) for row in sentences(4)]

    def collated(i):
        return {"length": torch.tensor(len(words[i].fields["text"].words)), "what": object()}

    assert digest(words, collated) == digest(list(words), collated)
    assert digest(words, collated) != digest(words, lambda i: {"length": torch.tensor(-1), "what": object()})


def test_each_parameter_and_buffer_has_a_digest():
    model = nn.BatchNorm1d(3)
    before = fingerprint.of_model(model)
    model.running_mean += 1e-7
    after = fingerprint.of_model(model)
    assert [name for name in before if before[name] != after[name]] == ["the model's 'running_mean'"]
