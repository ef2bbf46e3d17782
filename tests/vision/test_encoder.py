"""The vision transformer: padding, batch independence, the released mode, and parity with transformers' mllama."""

import pytest
import torch
from herdkit.vision.encoder import VisionConfig, VisionTransformer, by_arrangement, preset
from herdkit.vision.packed import PackedTiles
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.image_processing_mllama import get_all_supported_aspect_ratios
from transformers.models.mllama.modeling_mllama import MllamaVisionModel


def small(**changes) -> VisionConfig:
    sizes = {"image_size": 28, "patch_size": 7, "dim": 32, "n_layers": 4, "n_heads": 4, "ffn_dim": 64}
    return VisionConfig(**(sizes | {"n_global_layers": 2, "taps": (2, 3), "max_tiles": 4} | changes))


def roughen(module: nn.Module, std: float = 0.2) -> None:
    """Random weights of that deviation everywhere, gates, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * std
            p.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)


def encoder(**changes) -> VisionTransformer:
    model = VisionTransformer(small(**changes)).double()
    roughen(model)
    return model


GRIDS = torch.tensor([[1, 1], [2, 2], [1, 2], [3, 1], [1, 1], [2, 1]])
COUNTS = GRIDS.prod(1)


def pictures(seed: int = 0) -> torch.Tensor:
    """Float tiles of the images of GRIDS, zeros where there is no tile."""
    tiles = torch.randn(6, 4, 3, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tiles * (torch.arange(4) < COUNTS[:, None])[..., None, None, None]


def test_paper_sizes():
    with torch.device("meta"):
        blocks = VisionTransformer(preset("h14"))
        full = {px: VisionTransformer(preset(f"h14-{px}")) for px in (448, 560)}
    assert sum(p.numel() for p in blocks.layers.parameters()) / 1e6 == pytest.approx(629.5, abs=0.06)
    assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(630e6, rel=2e-3)
    # With the projection to the 8B model's width the released layout has these totals (841.5M at 448 px).
    for px, total in {448: 841.5, 560: 854.0}.items():
        count = sum(p.numel() for p in full[px].parameters()) + 7680 * 4096 + 4096
        assert count / 1e6 == pytest.approx(total, abs=0.06)
        assert full[px].width == 7680


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_padded_tiles_change_nothing(pooling):
    model = encoder(pooling=pooling)
    clean = pictures().requires_grad_()
    real = (torch.arange(4) < COUNTS[:, None])[..., None, None, None]
    junk = torch.where(real, pictures(), torch.nan).requires_grad_()
    weights = torch.randn(6, 4, 17, 96, dtype=torch.float64)
    results = []
    for tiles in (clean, junk):
        model.zero_grad()
        features, mask = model(tiles, COUNTS, GRIDS)
        ((features * weights).sum() + model.pooled(tiles, COUNTS, GRIDS).square().sum()).backward()
        results.append((features, mask, tiles.grad, {n: p.grad for n, p in model.named_parameters()}))
    (a, mask, grad_a, weights_a), (b, _, grad_b, weights_b) = results
    assert torch.equal(a, b)
    assert torch.equal(grad_a, grad_b)
    assert all(torch.equal(weights_a[n], weights_b[n]) for n in weights_a)
    assert not grad_b[~real.expand_as(grad_b)].any()
    assert torch.equal(mask.view(6, 4, 17), (torch.arange(4) < COUNTS[:, None])[..., None].expand(6, 4, 17))
    assert not a[~mask.view(6, 4, 17)].any()


def test_an_image_does_not_depend_on_its_batch():
    model = encoder()
    features, _ = model(pictures(), COUNTS, GRIDS)
    pooled = model.pooled(pictures(), COUNTS, GRIDS)
    for i, count in enumerate(COUNTS.tolist()):
        alone, mask = model(pictures()[i : i + 1, :count], COUNTS[i : i + 1], GRIDS[i : i + 1])
        assert mask.all()
        torch.testing.assert_close(features[i : i + 1, :count], alone, rtol=0, atol=1e-12)
        single = model.pooled(pictures()[i : i + 1], COUNTS[i : i + 1], GRIDS[i : i + 1])
        torch.testing.assert_close(pooled[i : i + 1], single, rtol=0, atol=1e-12)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted, _ = model(pictures()[order], COUNTS[order], GRIDS[order])
    torch.testing.assert_close(permuted, features[order], rtol=0, atol=1e-12)


def test_tiles_of_one_image_see_each_other_and_their_arrangement():
    model = encoder()
    features, _ = model(pictures(), COUNTS, GRIDS)
    moved = pictures()
    moved[1, 3] += 1
    others, _ = model(moved, COUNTS, GRIDS)
    changed = (others - features).abs().amax((2, 3)) > 1e-6
    assert changed[1].all()
    assert not changed[[0, 2, 3, 4, 5]].any()
    # The same two tiles side by side and one above the other are different pictures.
    tiles = pictures()[2:3, :2]
    beside, _ = model(tiles, torch.tensor([2]), torch.tensor([[1, 2]]))
    above, _ = model(tiles, torch.tensor([2]), torch.tensor([[2, 1]]))
    assert (beside[0, 0] - above[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["clean", "released"])
def test_tables_by_arrangement_learn_at_the_tiles_of_their_canvas(padding):
    """And where those by place hold the same, the features are the same."""
    model, placed = encoder(tile_tables="arrangement", padding=padding), encoder(padding=padding)
    tables = ("pre_tile_embedding", "post_tile_embedding", "tile_position_embedding")
    placed.load_state_dict({n: t for n, t in model.state_dict().items() if n not in tables}, strict=False)
    with torch.no_grad():
        for name in tables:
            getattr(model, name).copy_(by_arrangement(getattr(placed, name)))
    features, mask = model(pictures(), COUNTS, GRIDS)
    expected, _ = placed(pictures(), COUNTS, GRIDS)
    real = mask.view(6, 4, 17)
    torch.testing.assert_close(features[real], expected[real], rtol=0, atol=1e-12)
    features[real].square().sum().backward()
    numbers = [1 + get_all_supported_aspect_ratios(4).index(tuple(grid)) for grid in GRIDS.tolist()]
    used = torch.zeros(9, 4, dtype=torch.bool)
    for number, count in zip(numbers, COUNTS.tolist(), strict=True):
        used[number, : count if padding == "clean" else 4] = True
    for name in tables:
        assert torch.equal(getattr(model, name).grad.abs().amax((2, 3)) > 0, used), name


def test_gates_at_their_start_leave_a_plain_vit():
    torch.manual_seed(0)
    full = VisionTransformer(small(taps=())).double()
    plain = VisionTransformer(small(taps=(), max_tiles=1, n_global_layers=0)).double()
    plain.load_state_dict({k: v for k, v in full.state_dict().items() if k in plain.state_dict()})
    one, grid = torch.ones(6, dtype=torch.int64), torch.ones(6, 2, dtype=torch.int64)
    a, _ = full(pictures()[:, :1], one, grid)
    b, _ = plain(pictures()[:, :1], one, grid)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_tile_positions_start_as_the_stretched_table():
    torch.manual_seed(0)
    model = VisionTransformer(small())
    table = model.tile_position_embedding
    assert torch.equal(table[2, 3, 0], model.position_embedding[0])
    # Aligned corners: the four corners of the canvas are the four corners of the ViT's grid.
    corners = [(0, 0, 0, 0), (0, 3, 3, 3), (3, 0, 12, 12), (3, 3, 15, 15)]
    for row, column, patch, source in corners:
        torch.testing.assert_close(table[row, column, 1 + patch], model.position_embedding[1 + source])


def test_uint8_is_normalised_and_float_is_not():
    model = VisionTransformer(small(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    raw = torch.randint(0, 256, (2, 1, 3, 28, 28), dtype=torch.uint8)
    scaled = (raw / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(model.normalise(raw), scaled)
    assert model.normalise(scaled) is scaled


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch_size": 5}, "patch_size"),
        ({"n_heads": 3}, "n_heads"),
        ({"taps": (4,)}, "taps"),
        ({"taps": (3, 1)}, "taps"),
        ({"dim": 0}, "dim"),
        ({"padding": "pad"}, "padding"),
        ({"activation": "relu"}, "activation"),
        ({"mean": (0.5,)}, "mean"),
    ],
)
def test_config_names_the_wrong_field(change, named):
    with pytest.raises(ValueError, match=named):
        small(**change)


def test_wrong_inputs_are_named():
    model = encoder()
    with pytest.raises(ValueError, match="n_tiles"):
        model(pictures()[:, :2], COUNTS, GRIDS)
    with pytest.raises(ValueError, match="28 squared"):
        model(torch.zeros(1, 1, 3, 14, 14, dtype=torch.float64), torch.tensor([1]), torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match="h14"):
        preset("h15")


def test_packing_is_the_inverse_of_unpacking():
    packed = PackedTiles(COUNTS, 4)
    x = torch.randn(6, 4, 5)
    assert packed.groups == [(2, 1), (2, 2), (1, 3), (1, 4)]
    real = torch.arange(4) < COUNTS[:, None]
    assert packed.pack(x).shape == (13, 5)
    assert torch.equal(packed.unpack(packed.pack(x)), x * real[..., None])
    mean = (x * real[..., None]).sum(1) / COUNTS[:, None]
    torch.testing.assert_close(packed.mean(packed.pack(x)), mean)


def to_mllama(model: VisionTransformer) -> MllamaVisionModel:
    """transformers' encoder with our weights. It counts taps by block outputs, one less than the release, and
    keeps the tile tables expanded by aspect ratio id."""
    c = model.config
    ratios = get_all_supported_aspect_ratios(4)
    other = MllamaVisionModel(
        MllamaVisionConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.n_layers,
            num_global_layers=c.n_global_layers,
            attention_heads=c.n_heads,
            intermediate_size=c.ffn_dim,
            vision_output_dim=c.width,
            image_size=c.image_size,
            patch_size=c.patch_size,
            norm_eps=c.norm_eps,
            max_num_tiles=4,
            intermediate_layers_indices=[tap - 1 for tap in c.taps],
            supported_aspect_ratios=[list(ratio) for ratio in ratios],
        )
    ).to(model.class_embedding.dtype)
    ours = model.state_dict()

    def expanded(table: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(ratios) + 1, 4, *table.shape[2:], dtype=table.dtype)
        for number, (r, k) in enumerate(ratios, start=1):
            rows[number, : r * k] = table[:r, :k].flatten(0, 1)
        return rows.flatten(1)

    state = {
        "class_embedding": ours["class_embedding"],
        "patch_embedding.weight": ours["patch_embedding.weight"].view(c.dim, 3, c.patch_size, c.patch_size),
        "gated_positional_embedding.gate": ours["position_gate"],
        "gated_positional_embedding.embedding": ours["position_embedding"],
        "gated_positional_embedding.tile_embedding.weight": expanded(ours["tile_position_embedding"]),
    }
    for when in ("pre", "post"):
        state[f"{when}_tile_positional_embedding.embedding.weight"] = expanded(ours[f"{when}_tile_embedding"])
        state[f"{when}_tile_positional_embedding.gate"] = ours[f"{when}_tile_gate"]
    for end in ("weight", "bias"):
        state[f"layernorm_pre.{end}"] = ours[f"input_norm.{end}"]
        state[f"layernorm_post.{end}"] = ours[f"norm.{end}"]
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.out": "self_attn.o_proj",
        "mlp": "mlp",
        "gate_attention": "gate_attn",
        "gate_mlp": "gate_ffn",
    }
    for name, value in ours.items():
        stack, _, rest = name.partition(".")
        if stack not in ("layers", "global_layers"):
            continue
        number, _, rest = rest.partition(".")
        prefix = f"{'transformer' if stack == 'layers' else 'global_transformer'}.layers.{number}."
        if rest == "attention.qkv.weight":
            for part, weight in zip("qkv", value.chunk(3), strict=True):
                state[f"{prefix}self_attn.{part}_proj.weight"] = weight
            continue
        stem = max((stem for stem in names if rest.startswith(stem)), key=len)
        state[prefix + names[stem] + rest.removeprefix(stem)] = value
    other.load_state_dict(state)
    return other.eval()


@pytest.mark.parametrize("junk", [0.0, 3.0])
def test_released_mode_is_transformers_mllama(junk):
    """All of the forward order of the release, what stands in padded tiles included: it reaches the real ones."""
    model = encoder(padding="released")
    other = to_mllama(model)
    ratios = get_all_supported_aspect_ratios(4)
    ids = torch.tensor([[ratios.index(tuple(grid)) + 1] for grid in GRIDS.tolist()])
    real = torch.arange(4) < COUNTS[:, None]
    tiles = torch.where(real[..., None, None, None], pictures(), junk)
    theirs = other(tiles[:, None], aspect_ratio_ids=ids, aspect_ratio_mask=real.long()[:, None]).last_hidden_state
    features, mask = model(tiles, COUNTS, GRIDS)
    assert torch.equal(mask.view(6, 4, 17).any(-1), real)
    # transformers adds finfo.min where our mask is boolean: equal but for rounding.
    torch.testing.assert_close(features[real], theirs[:, 0][real], rtol=0, atol=1e-9)
    if junk:
        unsoiled, _ = model(pictures(), COUNTS, GRIDS)
        moved = (features - unsoiled)[real].abs().amax((1, 2))
        assert (moved[COUNTS.repeat_interleave(COUNTS) < 4] > 1e-3).all()


@pytest.mark.parametrize("taps", [(2, 3), (0,), (0, 1, 3), ()])
def test_clean_mode_is_the_released_order_over_real_tokens_alone(taps):
    model = encoder(taps=taps)
    features, _ = model(pictures(), COUNTS, GRIDS)
    for i, (rows, columns) in enumerate(GRIDS.tolist()):
        reference = plain_features(model, pictures()[i, : rows * columns], rows, columns)
        torch.testing.assert_close(features[i, : rows * columns], reference, rtol=0, atol=1e-11)


def plain_features(model: VisionTransformer, tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The forward order of the release for one image, written with torch's own attention and convolution."""
    c, dim = model.config, model.config.dim
    kernel = model.patch_embedding.weight.view(dim, 3, c.patch_size, c.patch_size)
    x = nn.functional.conv2d(tiles, kernel, stride=c.patch_size).flatten(2).transpose(1, 2)
    x = x + model.pre_tile_gate.tanh() * model.pre_tile_embedding[:rows, :columns].flatten(0, 1)
    x = torch.cat([model.class_embedding.expand(len(tiles), 1, dim), x], 1)
    gate = model.position_gate.tanh()
    x = x + (1 - gate) * model.position_embedding
    x = x + gate * model.tile_position_embedding[:rows, :columns].flatten(0, 1)
    x = model.input_norm(x).reshape(1, -1, dim)
    states = []

    def block(layer, x):
        mha = nn.MultiheadAttention(dim, c.n_heads, bias=False, batch_first=True).double()
        mha.in_proj_weight = layer.attention.qkv.weight
        mha.out_proj.weight = layer.attention.out.weight
        y = layer.attention_norm(x)
        gates = [1 if g is None else g.tanh() for g in (layer.gate_attention, layer.gate_mlp)]
        x = x + gates[0] * mha(y, y, y, need_weights=False)[0]
        return x + gates[1] * layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(layer.mlp_norm(x))))

    for layer in model.layers:
        states.append(x)
        x = block(layer, x)
    x = model.norm(x).view(len(tiles), -1, dim)
    x = x + model.post_tile_gate.tanh() * model.post_tile_embedding[:rows, :columns].flatten(0, 1)
    x = x.reshape(1, -1, dim)
    for layer in model.global_layers:
        x = block(layer, x)
    out = torch.empty(x.shape[1], c.width, dtype=x.dtype)
    out[:, :dim] = x[0]
    for j, tap in enumerate(c.taps):
        out[:, dim + j :: len(c.taps)] = states[tap][0]
    return out.view(len(tiles), -1, c.width)


def test_released_mode_zeroes_padded_uint8_tiles():
    """Black pixels are not zeros after normalisation; the release normalises first and pads then."""
    model = VisionTransformer(small(padding="released"))
    roughen(model)
    raw = torch.randint(0, 256, (6, 4, 3, 28, 28), dtype=torch.uint8)
    real = (torch.arange(4) < COUNTS[:, None])[..., None, None, None]
    given, _ = model(raw, COUNTS, GRIDS)
    by_hand, _ = model(model.normalise(raw) * real, COUNTS, GRIDS)
    torch.testing.assert_close(given, by_hand)
    # A batch whose largest image has two tiles is still padded to four.
    pair, _ = model(raw[2:3, :2], COUNTS[2:3], GRIDS[2:3])
    torch.testing.assert_close(pair[0], given[2, :2], rtol=1e-4, atol=1e-5)


def test_one_step_in_bfloat16_autocast_is_near_float32():
    torch.manual_seed(0)
    model = VisionTransformer(preset("tiny"))
    tiles = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    counts, grid = torch.tensor([1, 2]), torch.tensor([[1, 1], [2, 1]])
    exact = model.pooled(tiles, counts, grid)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.pooled(tiles, counts, grid)
        features, _ = model(tiles, counts, grid)
    features.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (rough - exact).norm() / exact.norm() < 0.03


def test_flops_count_the_matrix_products():
    model = VisionTransformer(preset("tiny", patch_bias=False))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 4, 3, 64, 64), torch.tensor([4]), torch.tensor([[2, 2]]))
    assert model.flops_per_image(4) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_patch_norm_forgets_how_bright_and_how_strong_a_patch_is():
    model = encoder(patch_norm=True)
    with torch.no_grad():
        model.patch_norm.weight.fill_(1.0)
        model.patch_norm.bias.zero_()
    tiles = pictures()
    brighter = 3 * tiles + 2
    grids, counts = GRIDS[:1], COUNTS[:1]
    same = model(tiles[:1], counts, grids)[0] - model(brighter[:1], counts, grids)[0]
    assert same.abs().max() < 0.1  # the norm's epsilon is not nothing
    plain = encoder()
    assert (plain(tiles[:1], counts, grids)[0] - plain(brighter[:1], counts, grids)[0]).abs().max() > 0.5


def test_positions_start_with_the_asked_deviation():
    assert VisionTransformer(small(position_std=1.0)).position_embedding.std().item() == pytest.approx(1, abs=0.1)
    assert VisionTransformer(small()).position_embedding.std().item() == pytest.approx(32**-0.5, abs=0.03)
