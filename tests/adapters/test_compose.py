"""The contract of design section 4, on small random models in float64."""

import pytest
import torch
from herdkit.adapters import ModalityBatch, Placements, compose
from toy_adapters import TEXT, MemoryAdapter, SoftAdapter, ToyConfig, VideoToy, randomise, text_model

FOREVER = torch.iinfo(torch.int64).max
IMAGE, AUDIO = 300, 302


def build(*kinds):
    adapters = {kind.modality: randomise(kind(ToyConfig(), TEXT), seed=i + 1) for i, kind in enumerate(kinds)}
    return compose(text_model(), **adapters).eval()


def inputs_of(items, places, soft=False):
    """`places`: (row, start, length, end, input) each."""
    columns = torch.tensor(places).unbind(1)
    names = ("row", "start", "length", "end", "input")
    tensors = (SoftAdapter if soft else MemoryAdapter)(ToyConfig(), TEXT).prepare(items)
    return ModalityBatch(tensors, Placements(**dict(zip(names, columns, strict=True))))


def tokens_of(rows, length, seed=0):
    return torch.randint(0, 290, (rows, length), generator=torch.Generator().manual_seed(seed))


def items_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in lengths]


def test_text_only_logits_are_bit_identical_with_everything_attached():
    tokens = tokens_of(3, 20)
    bare = text_model()(tokens)
    assert torch.equal(build(MemoryAdapter, VideoToy, SoftAdapter)(tokens), bare)


def test_rows_and_positions_without_inputs_keep_their_bits_in_a_mixed_batch():
    model = build(MemoryAdapter)
    tokens = tokens_of(3, 12)
    logits = model(tokens, {"image": inputs_of(items_of(5), [(1, 4, 1, FOREVER, 0)])})
    bare = model(tokens)
    assert torch.equal(logits[0], bare[0])
    assert torch.equal(logits[2], bare[2])
    assert torch.equal(logits[1, :4], bare[1, :4])
    assert not torch.allclose(logits[1, 4], bare[1, 4])


def test_a_mixed_batch_equals_each_row_alone():
    model = build(MemoryAdapter, VideoToy, SoftAdapter)
    tokens = tokens_of(4, 16)
    images, sounds = items_of(5, 3, 7), items_of(2, 4, seed=3)
    batch = {
        "image": inputs_of(images, [(0, 2, 1, 9, 0), (0, 9, 1, FOREVER, 1), (2, 5, 1, FOREVER, 2)]),
        "video": inputs_of(images[:1], [(2, 3, 1, FOREVER, 0)]),
        "speech": inputs_of(sounds, [(3, 1, 2, FOREVER, 0), (2, 8, 4, FOREVER, 1)], soft=True),
    }
    logits = model(tokens, batch)
    alone = {
        0: {"image": inputs_of(images[:2], [(0, 2, 1, 9, 0), (0, 9, 1, FOREVER, 1)])},
        1: None,
        2: {
            "image": inputs_of(images[2:], [(0, 5, 1, FOREVER, 0)]),
            "video": inputs_of(images[:1], [(0, 3, 1, FOREVER, 0)]),
            "speech": inputs_of(sounds[1:], [(0, 8, 4, FOREVER, 0)], soft=True),
        },
        3: {"speech": inputs_of(sounds[:1], [(0, 1, 2, FOREVER, 0)], soft=True)},
    }
    for row, inputs in alone.items():
        torch.testing.assert_close(model(tokens[row : row + 1], inputs)[0], logits[row], rtol=0, atol=1e-10)


def test_an_image_is_seen_from_its_placeholder_up_to_its_end_and_not_after():
    model = build(MemoryAdapter)
    tokens = tokens_of(1, 12)
    items = items_of(4, 4)
    places = [(0, 2, 1, 7, 0), (0, 7, 1, FOREVER, 1)]
    before = model(tokens, {"image": inputs_of(items, places)})
    changed = [items[0], items[1] + 1]
    after = model(tokens, {"image": inputs_of(changed, places)})
    moved = (before != after).any(-1)[0].tolist()
    assert moved == [False] * 7 + [True] * 5

    # Cut all self-attention, so that nothing but the cross-attention's own mask can carry the first image on.
    for layer in model.text.layers:
        torch.nn.init.zeros_(layer.attention.wo.weight)
    before = model(tokens, {"image": inputs_of(items, places)})
    after = model(tokens, {"image": inputs_of([items[0] + 1, items[1]], places)})
    moved = (before != after).any(-1)[0].tolist()
    assert moved == [False] * 2 + [True] * 5 + [False] * 5


def test_padding_of_the_memory_changes_nothing():
    model = build(MemoryAdapter)
    tokens = tokens_of(2, 10)
    items, places = items_of(3, 8), [(0, 1, 1, FOREVER, 0), (1, 2, 1, FOREVER, 1)]
    clean = inputs_of(items, places)
    dirty = inputs_of(items, places)
    dirty.tensors["values"][0, 3:] = 1e3
    assert torch.equal(model(tokens, {"image": clean}), model(tokens, {"image": dirty}))


def test_an_input_shown_in_several_documents_is_encoded_once_with_the_same_result_and_gradients():
    model = build(MemoryAdapter)
    tokens = tokens_of(1, 12)
    documents = torch.tensor([[0] * 6 + [1] * 6])
    items = items_of(5)
    shared = inputs_of(items, [(0, 1, 1, 6, 0), (0, 7, 1, FOREVER, 0)])
    copied = inputs_of([items[0], items[0].clone()], [(0, 1, 1, 6, 0), (0, 7, 1, FOREVER, 1)])
    gradients = []
    for inputs in (shared, copied):
        model.zero_grad()
        logits = model(tokens, {"image": inputs}, documents=documents)
        logits.square().sum().backward()
        gradients.append((logits.detach(), model.image.encoder.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)
    separate = [model(tokens[:, at : at + 6], {"image": inputs_of(items, [(0, 1, 1, FOREVER, 0)])}) for at in (0, 6)]
    torch.testing.assert_close(gradients[0][0], torch.cat(separate, dim=1), rtol=0, atol=1e-10)


def test_gradients_reach_the_adapter_through_the_frozen_text_and_from_no_other_row():
    model = build(MemoryAdapter, SoftAdapter)
    model.text.requires_grad_(False)
    tokens = tokens_of(2, 10)
    inputs = {
        "image": inputs_of(items_of(4), [(0, 1, 1, FOREVER, 0)]),
        "speech": inputs_of(items_of(3, seed=2), [(1, 2, 3, FOREVER, 0)], soft=True),
    }
    model(tokens, inputs)[0].sum().backward()
    assert all(p.grad is None for p in model.text.parameters())
    assert model.image.encoder.weight.grad.abs().sum() > 0
    assert model.speech.encoder.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("step", [1, 3])
def test_cached_decoding_equals_the_full_forward_for_ragged_rows_of_mixed_inputs(step):
    model = build(MemoryAdapter, VideoToy, SoftAdapter)
    tokens = tokens_of(3, 15)
    prompts = [9, 6, 4]
    inputs = {
        "image": inputs_of(items_of(5, 3, 2), [(0, 1, 1, 4, 0), (0, 4, 1, FOREVER, 1), (1, 0, 1, FOREVER, 2)]),
        "video": inputs_of(items_of(6), [(0, 2, 1, FOREVER, 0)]),
        "speech": inputs_of(items_of(3, seed=4), [(1, 2, 3, FOREVER, 0)], soft=True),
    }
    full = model(tokens, inputs)
    cache = model.make_cache(3, 15)
    start = max(prompts)
    positions = torch.arange(start).expand(3, start)
    prefill = model(tokens[:, :start], inputs, positions=positions, cache=cache)
    for row, length in enumerate(prompts):
        torch.testing.assert_close(prefill[row, :length], full[row, :length], rtol=0, atol=1e-10)
    at = torch.tensor(prompts)
    while int(at.max()) + step <= 15:
        columns = at[:, None] + torch.arange(step)
        logits = model(tokens.gather(1, columns), positions=columns, cache=cache)
        expected = full.gather(1, columns[..., None].expand(-1, -1, full.shape[-1]))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        at = at + step


def test_video_layers_run_before_image_layers_whatever_the_order_of_inputs():
    model = build(MemoryAdapter, VideoToy)
    tokens = tokens_of(1, 8)
    image = inputs_of(items_of(4), [(0, 1, 1, FOREVER, 0)])
    video = inputs_of(items_of(3, seed=5), [(0, 2, 1, FOREVER, 0)])
    calls = []
    for name, adapter in model.adapters.items():
        adapter.layers[0].register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    first = model(tokens, {"image": image, "video": video})
    second = model(tokens, {"video": video, "image": image})
    assert calls == ["video", "image"] * 2
    assert torch.equal(first, second)


def test_attach_and_detach():
    model = build(MemoryAdapter, VideoToy)
    names = set(model.text.state_dict())
    with pytest.raises(ValueError, match=r"'video'.* require"):
        model.detach("image")
    video = model.detach("video")
    assert model.modalities == ["image"]
    with pytest.raises(ValueError, match="taken"):
        model.attach(MemoryAdapter(ToyConfig(), TEXT))
    model.detach("image")
    assert set(model.state_dict()) == {f"text.{name}" for name in names}
    with pytest.raises(ValueError, match="requires: \\['image'\\]"):
        model.attach(video)
    with pytest.raises(ValueError, match="inputs of \\['image'\\]"):
        model(tokens_of(1, 4), {"image": inputs_of(items_of(1), [(0, 0, 1, FOREVER, 0)])})


def test_more_placeholders_than_soft_tokens_is_an_error():
    model = build(SoftAdapter)
    inputs = inputs_of(items_of(3), [(0, 1, 4, FOREVER, 0)], soft=True)
    with pytest.raises(ValueError, match="4 placeholders, but its adapter gave 3"):
        model(tokens_of(1, 8), {"speech": inputs})


def test_memory_gradients_add_up_in_float32_under_bfloat16():
    model = build(MemoryAdapter).float()
    tokens = tokens_of(1, 6)
    inputs = inputs_of([item.float() for item in items_of(3)], [(0, 0, 1, FOREVER, 0)])
    seen = []
    for layer in model.image.layers:
        layer.attention.wk.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, {"image": inputs})
    assert seen == [torch.float32, torch.float32]


def test_cost_accounting_counts_what_is_there():
    model = build(MemoryAdapter, SoftAdapter)
    table = {name: total for name, total, _ in model.parameter_table()}
    assert table["image"] == sum(p.numel() for p in model.image.parameters())
    assert sum(table.values()) == sum(p.numel() for p in model.parameters())
    extra = model.flops_per_token(10, {"image": 7}) - model.flops_per_token(10)
    weights = sum(p.numel() for layer in model.image.layers for p in layer.parameters())
    assert extra >= 2 * weights * 0.9
