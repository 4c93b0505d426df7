import pytest
import torch

from syncmask.fusion import SyncMaskFusionEncoder, SyncMaskMimDecoder, take_positions


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder(tiny_model):
    return tiny_model.syncmask.fusion_encoder


@pytest.fixture
def decoder(tiny_model):
    return tiny_model.mim_decoder


@pytest.fixture
def mask():
    return (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()


def fuse(encoder, texts, mask, images, **kwargs):
    return encoder(texts, mask, encoder_hidden_states=images, **kwargs).last_hidden_state


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ slow oracle


def slow_attention(block, queries, keys, mask):
    """One head and one query at a time; queries (L, D), keys (M, E), mask (M,)."""
    q, k, v = block.query(queries), block.key(keys), block.value(keys)
    size, rows = block.head_dim, []
    for query in q:
        parts = []
        for start in range(0, q.shape[1], size):
            part = slice(start, start + size)
            scores = [(query[part] @ key[part]) / size**0.5 for key in k]
            kept = [m for m in range(len(k)) if mask[m]]
            weights = torch.stack([scores[m] for m in kept]).softmax(0)
            parts.append(sum(weight * v[m, part] for weight, m in zip(weights, kept)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@torch.no_grad()
def slow_layers(layers, states, mask, keys, key_mask):
    """BERT's post-norm layer with cross-attention: add and normalise after each of three blocks."""
    for layer in layers:
        attended = slow_attention(layer.self_attention, states, states, mask)
        states = layer.self_norm(states + layer.self_output(attended))
        attended = slow_attention(layer.cross_attention, states, keys, key_mask)
        states = layer.cross_norm(states + layer.cross_output(attended))
        expanded = torch.nn.functional.gelu(layer.intermediate(states))
        states = layer.output_norm(states + layer.output(expanded))
    return states


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_forward_equals_the_loop(encoder, mask, implementation):
    encoder.set_attn_implementation(implementation)
    texts, images = normal(3, 7, 32), normal(3, 5, 32, seed=1)
    fused = fuse(encoder, texts, mask, images)
    for row in range(3):
        slow = slow_layers(encoder.layers, texts[row], mask[row], images[row], torch.ones(5))
        length = int(mask[row].sum())
        close(fused[row, :length], slow[:length])


# --------------------------------------------------------------------------------------------------------- the encoder


def test_last_of_lower_equals_forward_at_the_positions(encoder, mask):
    texts, images, index = normal(5, 7, 32), normal(3, 6, 32, seed=1), torch.tensor([2, 0, 1, 1, 2])
    mask = mask[[0, 1, 2, 1, 0]]
    positions = torch.tensor([[0, 3], [2, 1], [4, 0], [3, 3], [6, 5]])
    whole = fuse(encoder, texts, mask, images, encoder_index=index)
    hidden = encoder.lower(texts, mask, images, index)
    close(encoder.last(hidden, mask, images, index, positions), take_positions(whole, positions))
    close(encoder.last(hidden, mask, images, index), whole)


def test_encoder_index_equals_repeated_images(encoder, mask):
    texts, images, index = normal(3, 7, 32), normal(2, 6, 32, seed=1), torch.tensor([1, 1, 0])
    close(fuse(encoder, texts, mask, images, encoder_index=index), fuse(encoder, texts, mask, images[index]))
    # Gradients of a photo that several texts look at add up.
    gradients = []
    for use_index in (True, False):
        leaf = images.clone().requires_grad_()
        fused = (
            fuse(encoder, texts, mask, leaf, encoder_index=index)
            if use_index
            else fuse(encoder, texts, mask, leaf[index])
        )
        gradients.append(torch.autograd.grad((fused * normal(3, 7, 32, seed=2)).sum(), leaf)[0])
    close(*gradients)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_it_is_never_causal(encoder, implementation, with_mask):
    encoder.set_attn_implementation(implementation)
    texts, images = normal(1, 7, 32), normal(1, 6, 32, seed=1)
    mask = torch.ones(1, 7) if with_mask else None
    for leaf_of, wanted in ((texts, 7), (images, 6)):
        leaf = leaf_of.clone().requires_grad_()
        inputs = (leaf, images) if leaf_of is texts else (texts, leaf)
        # Each token's output sees every token of the text and of the photo, the last one included.
        for place in range(7):
            fused = fuse(encoder, inputs[0], mask, inputs[1])
            seen = torch.autograd.grad(fused[0, place].square().sum(), leaf)[0].abs().sum(dim=-1) > 0
            assert seen.sum() == wanted


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_changes_nothing(encoder, mask, implementation):
    encoder.set_attn_implementation(implementation)
    texts, images = normal(3, 7, 32), normal(3, 6, 32, seed=1)
    fused = fuse(encoder, texts, mask, images)
    spoilt = torch.where(mask[..., None] == 0, 100 * normal(3, 7, 32, seed=3), texts)
    close(fuse(encoder, spoilt, mask, images)[mask == 1], fused[mask == 1])
    for row in range(3):
        length = int(mask[row].sum())
        alone = fuse(encoder, texts[row : row + 1, :length], None, images[row : row + 1])
        close(fused[row, :length], alone[0])


def test_gradient_checkpointing_gives_equal_gradients(encoder, mask, checkpoint_activations):
    texts, images = normal(3, 7, 32), normal(3, 6, 32, seed=1)
    encoder.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(encoder)
            assert all(layer.gradient_checkpointing for layer in encoder.layers)
        encoder.zero_grad()
        leaf = images.clone().requires_grad_()
        fuse(encoder, texts, mask, leaf).square().mean().backward()
        gradients.append([leaf.grad] + [parameter.grad.clone() for parameter in encoder.parameters()])
    for one, other in zip(*gradients):
        close(one, other)


def test_cross_scores_do_not_run_the_layers_above(encoder, mask):
    texts, images = normal(3, 7, 32), normal(3, 6, 32, seed=1)
    scores = encoder.cross_scores(texts, mask, images, 0)
    assert scores.shape == (3, 4, 7, 6)
    with torch.no_grad():
        for parameter in encoder.layers[1].parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(encoder.cross_scores(texts, mask, images, 0), scores)


def test_hidden_states_and_attentions_on_request(encoder, mask):
    encoder.set_attn_implementation("eager")
    texts, images = normal(3, 7, 32), normal(3, 6, 32, seed=1)
    output = encoder(texts, mask, encoder_hidden_states=images, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 7, 32)] * 3
    assert torch.equal(output.hidden_states[0], texts)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 7, 7)] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(3, 4, 7, 6)] * 2
    for weights in (*output.attentions, *output.cross_attentions):
        close(weights.sum(dim=-1), torch.ones(3, 4, 7))
    plain = encoder(texts, mask, encoder_hidden_states=images)
    assert plain.hidden_states is None and plain.attentions is None and plain.cross_attentions is None


def test_dropout_acts_in_training_only(tiny_config, mask):
    config = tiny_config.fusion_encoder_config
    config.hidden_dropout_prob = 0.5
    encoder = SyncMaskFusionEncoder(config)
    texts, images = normal(3, 7, 32), normal(3, 6, 32, seed=1)
    assert not torch.equal(fuse(encoder, texts, mask, images), fuse(encoder, texts, mask, images))
    encoder.eval()
    assert torch.equal(fuse(encoder, texts, mask, images), fuse(encoder, texts, mask, images))


# --------------------------------------------------------------------------------------------------------- the decoder


@pytest.fixture
def decoded(decoder, mask):
    """What the decoder is given: kept tokens of the photos, which were kept and hidden, the text."""
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    keep, hidden = order[:, :10].sort(dim=1).values, order[:, 10:].sort(dim=1).values
    return normal(3, 11, 32), keep, hidden, normal(3, 7, 32, seed=1), mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoder_equals_the_loop(decoder, decoded, implementation):
    decoder.set_attn_implementation(implementation)
    kept, keep, hidden, texts, mask = decoded
    fast = decoder(*decoded)
    assert fast.shape == (3, 6, 192)
    with torch.no_grad():
        for row in range(3):
            tokens = [decoder.embed(kept[row, 0])]
            for patch in range(16):
                place = (keep[row] == patch).nonzero()
                tokens.append(decoder.embed(kept[row, 1 + int(place)]) if len(place) else decoder.mask_token)
            states = torch.stack([token + decoder.position_embeddings[n] for n, token in enumerate(tokens)])
            states = slow_layers(decoder.layers, decoder.norm(states), torch.ones(17), texts[row], mask[row])
            for place, patch in enumerate(hidden[row].tolist()):
                close(fast[row, place], decoder.to_pixels(states[1 + patch]))


def test_decoder_reads_the_text_but_not_its_padding(decoder, decoded):
    kept, keep, hidden, texts, mask = decoded
    plain = decoder(*decoded)
    spoilt = torch.where(mask[..., None] == 0, 100.0, texts)
    close(decoder(kept, keep, hidden, spoilt, mask), plain)
    assert not torch.allclose(decoder(kept, keep, hidden, texts.flip(0), mask.flip(0)), plain, atol=1e-3)


def test_decoder_gradient_checkpointing(decoder, decoded, checkpoint_activations):
    decoder.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(decoder)
        decoder.zero_grad()
        decoder(*decoded).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters()])
    for one, other in zip(*gradients):
        close(one, other)


def test_a_fresh_decoder_tells_positions_apart(tiny_config):
    torch.manual_seed(0)
    decoder = SyncMaskMimDecoder(tiny_config.mim_decoder_config, 32, 1, 16, 192)
    assert decoder.position_embeddings.std() > 0.005 and decoder.mask_token.std() > 0.005
