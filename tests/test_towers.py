"""Image towers of every family: kept patches against a slow oracle, prefix tokens, norms, pooling, grids."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from syncmask import SyncMaskConfig, SyncMaskModel
from syncmask.towers import (
    build_tower,
    final_tokens,
    kept_patches,
    max_text_tokens,
    num_prefix_tokens,
    patch_grid,
    patchify,
    pool_tokens,
    resize_positions,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = {
    "vit": 1,
    "deit": 2,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 5,
}
every_family = pytest.mark.parametrize("family, prefix", FAMILIES.items())


def config_of(family, **changes):
    width = {} if family.startswith("dinov2") else {"intermediate_size": 48}
    return AutoConfig.for_model(family, **{**SIZES, **width, **changes})


def tower_of(family, **changes):
    torch.manual_seed(0)
    tower = build_tower(config_of(family, **changes)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return tower


@pytest.fixture
def photos():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens_of(tower, photos):
    return final_tokens(tower, tower(pixel_values=photos).last_hidden_state)


@torch.no_grad()
def slow_kept(tower, photo, keep, prefix):
    """Embed one whole photo, pick the tokens one by one, and run the tower layer by layer, by its parts' own names."""
    embedded = tower.embeddings(photo[None])[0]
    tokens = [embedded[place] for place in range(prefix)]
    tokens += [embedded[prefix + patch] for patch in keep.tolist()]
    states = torch.stack(tokens)[None]
    parts = dict(tower.named_modules())
    if "pre_layrnorm" in parts:
        states = parts["pre_layrnorm"](states)
    for layer in next(parts[name] for name in ("layers", "encoder.layers", "encoder.layer") if name in parts):
        states = layer(states, attention_mask=None)
    return next(parts[name] for name in ("layernorm", "post_layernorm") if name in parts)(states)[0]


@every_family
def test_kept_patches_equal_gathered_embeddings(family, prefix, photos):
    tower = tower_of(family)
    assert num_prefix_tokens(tower.config) == prefix
    keep = torch.tensor([[0, 3, 7, 15], [1, 2, 8, 9], [12, 4, 0, 5]])  # in any order
    with kept_patches(tower, keep, prefix), torch.no_grad():
        fast = tokens_of(tower, photos)
    assert fast.shape == (3, prefix + 4, 32)
    for row in range(3):
        torch.testing.assert_close(fast[row], slow_kept(tower, photos[row], keep[row], prefix), atol=1e-5, rtol=1e-4)


@every_family
def test_keeping_all_patches_is_the_tower_itself(family, prefix, photos):
    tower = tower_of(family)
    plain = tokens_of(tower, photos)
    for keep in (None, torch.arange(16).expand(3, -1)):
        with kept_patches(tower, keep, prefix):
            torch.testing.assert_close(tokens_of(tower, photos), plain)


@every_family
def test_the_first_patch_stands_behind_the_prefix(family, prefix, photos):
    """A change in one patch's pixels moves that patch's embedding and no other."""
    tower, painted = tower_of(family), photos[:1].clone()
    painted[:, :, 8:16, 24:] += 1  # patch 7
    with torch.no_grad():
        moved = (tower.embeddings(painted) - tower.embeddings(photos[:1])).abs().sum(dim=-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [prefix + 7]


@pytest.mark.parametrize("patch_size, image_size, grid", [(14, 42, (3, 3)), (14, 56, (4, 4)), (16, 32, (2, 2))])
def test_patches_of_14_pixels(patch_size, image_size, grid):
    tower = tower_of("dinov2", patch_size=patch_size, image_size=image_size)
    assert patch_grid(tower.config) == grid
    assert tokens_of(tower, torch.randn(1, 3, image_size, image_size)).shape == (1, 1 + grid[0] * grid[1], 32)


def test_clips_cls_is_its_own_pooled_token_and_its_patches_pass_the_same_norm(photos):
    tower = tower_of("clip_vision_model")
    with torch.no_grad():
        output = tower(pixel_values=photos)
        tokens = final_tokens(tower, output.last_hidden_state)
    torch.testing.assert_close(tokens[:, 0], output.pooler_output)
    torch.testing.assert_close(tokens[:, 5], tower.post_layernorm(output.last_hidden_state[:, 5]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip_vision_model"])
def test_the_other_families_norm_their_tokens_themselves(family, photos):
    tower = tower_of(family)
    with torch.no_grad():
        last = tower(pixel_values=photos).last_hidden_state
        norm = getattr(tower, "layernorm", None) or tower.post_layernorm
        states = (last - norm.bias) / norm.weight
    assert final_tokens(tower, last) is last
    torch.testing.assert_close(states.mean(-1), torch.zeros(states.shape[:2]), atol=1e-3, rtol=0)


def test_a_photo_is_cls_or_the_mean_of_its_patches():
    tokens = torch.randn(2, 5, 8)
    for prefix in (1, 2, 5):
        assert torch.equal(pool_tokens(tokens, prefix), tokens[:, 0])
    torch.testing.assert_close(pool_tokens(tokens, 0), sum(tokens[:, place] for place in range(5)) / 5)


@every_family
def test_a_whole_model_runs_on_every_family(family, prefix, tiny_config, photos):
    model = model_on(family, tiny_config)
    assert model.num_prefix_tokens == prefix
    tokens = model.encode_image(photos)
    assert tokens.shape == (3, prefix + 16, 32)
    assert model.encode_image(photos, keep=torch.zeros(3, 1, dtype=torch.long)).shape == (3, prefix + 1, 32)
    features = model.get_image_features(photos)
    torch.testing.assert_close(features.last_hidden_state, tokens)
    wanted = model.vision_projection(tokens[:, 0] if prefix else tokens.mean(1))
    torch.testing.assert_close(features.pooler_output, torch.nn.functional.normalize(wanted, dim=-1))


def model_on(family, tiny_config):
    config = SyncMaskConfig(
        mask_token_id=4,
        vision_config=config_of(family).to_dict(),
        text_config=tiny_config.text_config.to_dict(),
        fusion_encoder_config=tiny_config.fusion_encoder_config.to_dict(),
        mim_decoder_config=tiny_config.mim_decoder_config.to_dict(),
    )
    torch.manual_seed(0)
    return SyncMaskModel(config).eval()


@every_family
def test_eager_and_sdpa_agree(family, prefix, tiny_config, photos):
    model = model_on(family, tiny_config)
    seen = model.encode_image(photos)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model.encode_image(photos), seen, atol=1e-4, rtol=1e-4)


@every_family
def test_a_fresh_tower_uses_every_parameter(family, prefix, tiny_config, photos):
    model = model_on(family, tiny_config).train()
    model.get_image_features(photos).pooler_output[:, 0].sum().backward()
    assert not [name for name, parameter in model.vision_model.named_parameters() if parameter.grad is None]


def test_hidden_patches_have_no_influence(photos):
    tower, keep = tower_of("vit"), torch.tensor([[0, 1, 4, 5]]).expand(3, -1)
    painted = photos.clone()
    painted[:, :, 16:] = 99.0  # patches 8 to 15
    results = []
    for pixels in (photos, painted):
        with kept_patches(tower, keep, 1):
            results.append(tower(pixel_values=pixels).last_hidden_state)
    assert torch.equal(*results)


def test_the_hook_is_gone_after_use_and_after_an_error(photos):
    tower = tower_of("vit")
    with kept_patches(tower, torch.tensor([[0]]), 1):
        assert len(tower.embeddings._forward_hooks) == 1
    assert not tower.embeddings._forward_hooks
    with pytest.raises(RuntimeError), kept_patches(tower, torch.tensor([[99]] * 3), 1):  # no such patch
        tower(pixel_values=photos)
    assert not tower.embeddings._forward_hooks
    assert tower(pixel_values=photos).last_hidden_state.shape == (3, 17, 32)


def test_gradients_reach_the_kept_patches_alone(photos):
    tower = tower_of("vit")
    pixels = photos.clone().requires_grad_()
    with kept_patches(tower, torch.tensor([[5]]).expand(3, -1), 1):
        tower(pixel_values=pixels).last_hidden_state.square().sum().backward()
    touched = patchify(pixels.grad, (4, 4)).abs().sum(dim=-1) > 0
    assert touched.nonzero()[:, 1].tolist() == [5, 5, 5]


def test_towers_have_no_part_that_would_stay_unused():
    """Of all that the families' own models hold, these alone are left out."""
    left_out = {}
    for family in (*FAMILIES, "bert"):
        whole, tower = AutoModel.from_config(config_of(family)), build_tower(config_of(family))
        names = set(whole.state_dict()) - set(tower.state_dict())
        left_out[family] = {name.rpartition(".")[0].partition(".")[0] for name in names}
        assert set(tower.state_dict()) <= set(whole.state_dict())
    registers = left_out.pop("dinov2_with_registers")
    assert registers == left_out["dinov2"] == {"embeddings"}  # the mask token
    assert left_out == {
        **dict.fromkeys(("vit", "deit", "bert"), {"pooler"}),
        "clip_vision_model": set(),
        "siglip_vision_model": {"head"},
        "dinov2": {"embeddings"},
    }


def test_a_text_towers_room():
    assert max_text_tokens(tower_of("bert", max_position_embeddings=20)) == 20
    assert max_text_tokens(tower_of("roberta", max_position_embeddings=20, pad_token_id=1)) == 18
    assert max_text_tokens(tower_of("distilbert", max_position_embeddings=20)) == 20


@pytest.mark.parametrize("family", ["siglip2_vision_model", "swin", "convnext"])
def test_families_that_are_not_tested_are_refused(family):
    with pytest.raises(ValueError, match=rf"{family}.*deit.*vit"):
        num_prefix_tokens(AutoConfig.for_model(family))


def test_patchify_cuts_row_by_row_and_loses_nothing(photos):
    patches = patchify(photos, (4, 4))
    assert patches.shape == (3, 16, 192)
    for row in range(4):
        for column in range(4):
            window = photos[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(patches[:, 4 * row + column], window.flatten(1))


def test_patchify_agrees_with_the_towers_order(photos):
    """Patch n of `patchify` is what the tower's n-th patch token is made of."""
    embed = tower_of("vit").embeddings.patch_embeddings
    weight, bias = embed.projection.weight, embed.projection.bias
    torch.testing.assert_close(
        embed(photos), patchify(photos, (4, 4)) @ weight.flatten(1).T + bias, atol=1e-4, rtol=1e-4
    )


def test_photos_and_patches_need_not_be_square():
    config = AutoConfig.for_model("vit", image_size=[32, 16], patch_size=[8, 4])
    assert patch_grid(config) == (4, 4)
    pixels = torch.arange(32 * 16.0).view(1, 1, 32, 16)
    assert torch.equal(patchify(pixels, (4, 4))[0, 5], pixels[0, 0, 8:16, 4:8].flatten())


def test_a_patch_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch_size=7 does not divide image_size=32"):
        patch_grid(AutoConfig.for_model("vit", image_size=32, patch_size=7))


def test_positions_are_resized_as_a_picture_and_those_of_prefix_tokens_stay():
    """Families' own resizing is what tests/test_conversion.py compares with; this is of grids that are no square."""
    down = torch.arange(3.0)[:, None].expand(3, 2)  # each row of patches one more than the row above
    table = torch.cat([torch.tensor([9.0, 8.0]), down.flatten()])[None, :, None].expand(1, 8, 4)
    fitted = resize_positions(table, (3, 2), (6, 4))
    assert fitted.shape == (1, 26, 4) and fitted[0, :2, 0].tolist() == [9, 8]
    rows = fitted[0, 2:, 0].view(6, 4)
    torch.testing.assert_close(rows, rows[:, :1].expand(6, 4))
    torch.testing.assert_close(rows + rows.flip(0), torch.full((6, 4), 2.0))
    assert rows[0, 0] < rows[2, 0] < rows[5, 0] and resize_positions(table, (3, 2), (3, 2)) is table
