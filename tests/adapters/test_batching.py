import dataclasses
import io
import json
import pickle

import pytest
import torch
from herdkit.adapters import DialogCollator, Port, compose
from herdkit.adapters.batching import FOREVER, end_of_sight, split_turns
from herdkit.adapters.objective import next_token
from herdkit.data.dialogs import parse_dialog
from herdkit.data.shards import Sample
from herdkit.text import Tokenizer, Transformer
from toy_adapters import TEXT, MemoryAdapter, SoftAdapter, SoftPreparation, ToyConfig, VectorPreparation, randomise


class Stored:
    """Loads vectors from the bytes of a member."""

    def load(self, source):
        return torch.load(io.BytesIO(source), weights_only=True)


class StoredVectors(Stored, VectorPreparation):
    pass


class StoredSounds(Stored, SoftPreparation):
    pass


def as_bytes(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["what is it a dog and a cat look listen"], 520)


def ports(visibility="latest"):
    return [
        Port("image", "image", "<|image|>", StoredVectors(), visibility),
        Port("speech", "audio", "<|audio|>", StoredSounds(), "latest"),
    ]


def sample(messages, key="000", **media):
    members = {name: as_bytes(value) for name, value in media.items()}
    return Sample(key=key, shard="s.tar", members={"json": json.dumps({"messages": messages}).encode(), **members})


def ask(*content):
    return {"role": "user", "content": list(content)}


def say(text):
    return {"role": "assistant", "content": text}


IMAGE = {"type": "image", "image": "a"}
SOUND = {"type": "audio", "audio": "b"}


def text(words):
    return {"type": "text", "text": words}


def test_placements_point_at_the_placeholders_and_labels_at_the_answers(tokenizer):
    messages = [ask(IMAGE, text("what is it")), say("a dog"), ask(SOUND), say("a cat")]
    batch = DialogCollator(tokenizer, ports())([(0, sample(messages, a=torch.zeros(3, 6), b=torch.ones(4, 6)))])
    row = batch.tokens[0].tolist()
    image, sound = tokenizer.special("<|image|>"), tokenizer.special("<|audio|>")
    where = batch.inputs["image"].placements
    assert row[int(where.start[0])] == image
    assert row.count(image) == 1
    where = batch.inputs["speech"].placements
    start = int(where.start[0])
    assert row[start : start + 4] == [sound] * 4
    assert int(where.length[0]) == 4
    learned = [t for t in batch.labels[0].tolist() if t >= 0]
    eot = tokenizer.eot_id
    assert learned == [*tokenizer.encode("a dog"), eot, *tokenizer.encode("a cat"), eot]
    for at, label in enumerate(batch.labels[0].tolist()):
        assert label in (-100, row[at + 1] if at + 1 < len(row) else -100)


def test_independent_turns_share_the_image_and_see_only_their_own_document(tokenizer):
    messages = [ask(IMAGE, text("what is it")), say("a dog"), ask(text("and")), say("a cat")]
    one = sample(messages, a=torch.zeros(3, 6))
    batch = DialogCollator(tokenizer, ports(), turns="independent")([(0, one)])
    where = batch.inputs["image"].placements
    assert batch.inputs["image"].tensors["values"].shape[0] == 1
    assert where.input.tolist() == [0, 0]
    ids = batch.documents[0].tolist()
    assert [ids[s] for s in where.start.tolist()] == [0, 1]
    assert where.end.tolist() == [ids.index(1), FOREVER]
    alternate = DialogCollator(tokenizer, ports(), turns="alternate")
    assert alternate([(0, one)]).documents is None
    assert alternate([(1, one)]).documents is not None


def test_mixed_batches_equal_single_ones_in_loss(tokenizer):
    torch.manual_seed(0)
    config = dataclasses.replace(TEXT, vocab_size=tokenizer.vocab_size)
    adapters = {
        "image": randomise(MemoryAdapter(ToyConfig(), config)),
        "speech": randomise(SoftAdapter(ToyConfig(), config)),
    }
    model = compose(Transformer(config).double(), **adapters).eval()
    samples = [
        sample([ask(IMAGE, text("what")), say("a dog")], "0", a=torch.randn(3, 6).double()),
        sample([ask(text("listen")), say("a cat and a dog")], "1"),
        sample(
            [ask(SOUND, text("and")), say("it"), ask(IMAGE), say("look")],
            "2",
            a=torch.randn(5, 6).double(),
            b=torch.randn(2, 6).double(),
        ),
    ]
    collate = DialogCollator(tokenizer, ports())
    together = next_token(model, collate(list(enumerate(samples))))
    alone = [next_token(model, collate([(0, one)])) for one in samples]
    packed = next_token(
        model, DialogCollator(tokenizer, ports(), packed=True, row_length=200)(list(enumerate(samples)))
    )
    assert int(together[1]) == sum(int(one[1]) for one in alone) == int(packed[1])
    torch.testing.assert_close(together[0], sum(one[0] for one in alone))
    torch.testing.assert_close(packed[0], together[0])


def test_sight_ends_at_the_next_image_unless_they_adjoin():
    placed = [(2, 1, 0), (3, 1, 1), (8, 1, 2)]
    assert [end_of_sight(placed, i, 100, 120) for i in range(3)] == [108, 108, 120]
    assert end_of_sight([(2, 1, 0)], 0, 0, FOREVER) == FOREVER


def test_split_turns_keeps_the_system_prompt_and_carries_media():
    dialog = parse_dialog(
        [{"role": "system", "content": "be kind"}, ask(IMAGE, text("x")), say("1"), ask(text("y")), say("2")], "here"
    )
    first, second = split_turns(dialog)
    assert [m.role for m in second] == ["system", "user", "assistant"]
    assert second[1].parts[0] is dialog[1].parts[0]
    assert second[1].text == "y"
    assert first[1].text == "x"


def test_errors_name_the_sample(tokenizer):
    messages = [ask(IMAGE, text("what is it")), say("a dog")]
    one = sample(messages, "000123", a=torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"s\.tar: sample 000123: \d+ tokens do not fit into rows of 8"):
        DialogCollator(tokenizer, ports(), row_length=8)([(0, one)])
    with pytest.raises(ValueError, match=r"s\.tar: sample 000123.*'image'"):
        DialogCollator(tokenizer, ports()[1:])([(0, one)])


def test_lengths_are_those_of_every_distinct_input(tokenizer):
    class Measured(StoredVectors):
        def size(self, source):
            return len(self.load(source))

    image, sound = ports()
    collate = DialogCollator(tokenizer, [dataclasses.replace(image, prepare=Measured()), sound])
    pictures = {"jpg": torch.randn(3, 4), "png": torch.randn(5, 4)}
    messages = [
        ask({"type": "image", "image": "jpg"}, {"type": "image", "image": "png"}, {"type": "image", "image": "jpg"}),
        say("a dog"),
    ]
    assert collate.lengths(sample(messages, **pictures)) == [3, 5]
    assert collate.lengths(sample([ask({"type": "text", "text": "what"}), say("a cat")])) == []
    with pytest.raises(TypeError, match=r"StoredSounds has no method size; set data\.bucket\.by to bytes"):
        collate.lengths(sample([ask({"type": "audio", "audio": "wav"}), say("a cat")], wav=torch.randn(2, 4)))


def test_the_collator_travels_to_workers(tokenizer):
    messages = [ask(text("what is it")), say("a dog")]
    prepare = VectorPreparation()
    collate = DialogCollator(tokenizer, [Port("image", "image", "<|image|>", prepare, "latest")])
    copy = pickle.loads(pickle.dumps(collate))
    assert torch.equal(copy([(0, sample(messages))]).tokens, collate([(0, sample(messages))]).tokens)
