import pytest
import torch

import syncmask.word_scores as word_scores_module
from syncmask.word_scores import WordScores


class SlowScores:
    """Every measurement kept in a list, with the step it came from."""

    def __init__(self, decay):
        self.decay, self.step, self.seen = decay, 0, {}

    def update(self, words, scores, measured):
        self.step += 1
        for word, score, known in zip(words, scores, measured):
            if known:
                self.seen.setdefault(word, []).append((self.step, score))

    def sums(self, word):
        weights = [(self.decay ** (self.step - step), score) for step, score in self.seen.get(word, [])]
        return sum(weight * score for weight, score in weights), sum(weight for weight, _ in weights)

    def mean(self, word):
        total, count = self.sums(word)
        if count == 0:
            everything = [self.sums(each) for each in self.seen]
            total, count = (sum(column) for column in zip(*everything))
        return total / count


def texts(pairs):
    return list(zip(pairs["input_ids"], pairs["word_ids"]))


def words_of(pairs):
    """Return every word as its tuple of pieces, by (row, column)."""
    words = {}
    for row, (ids, numbers) in enumerate(texts(pairs)):
        for token, number in zip(ids.tolist(), numbers.tolist()):
            if number >= 0:
                words[row, number] = (*words.get((row, number), ()), token)
    return words


def test_words_are_keyed_by_their_pieces_in_sorted_order(pairs):
    scores, words = WordScores.from_texts(texts(pairs)), words_of(pairs)
    assert scores.vocabulary == sorted(set(words.values()))
    rows = scores.rows(pairs["input_ids"], pairs["word_ids"])
    assert rows.shape == (4, 6)
    for row in range(4):
        for column in range(6):
            word = words.get((row, column))
            assert rows[row, column] == (scores.vocabulary.index(word) if word else -1)


def test_order_of_the_texts_does_not_matter(pairs):
    assert WordScores.from_texts(texts(pairs)[::-1]).vocabulary == WordScores.from_texts(texts(pairs)).vocabulary


def test_means_equal_lists_with_decay():
    vocabulary = [(5,), (6,), (7, 8), (9,)]
    fast, slow = WordScores(vocabulary, decay=0.7), SlowScores(0.7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        rows = torch.randint(-1, 3, (2, 5), generator=generator)  # the last word is never seen
        scores, measured = torch.randn(2, 5, generator=generator), torch.rand(2, 5, generator=generator) < 0.7
        fast.update(rows, scores, measured)
        known = (measured & (rows >= 0)).flatten().tolist()
        slow.update(rows.flatten().tolist(), scores.flatten().tolist(), known)
    means = fast.means(torch.tensor([[0, 1, 2, 3, -1]]))
    assert means.dtype == torch.float32
    for word, mean in enumerate(means[0].tolist()):
        assert mean == pytest.approx(slow.mean(word), abs=1e-6)


def test_words_without_a_measurement_take_the_mean_of_all():
    scores = WordScores([(5,), (6,), (7,)])
    assert scores.means(torch.tensor([[0, -1]])).tolist() == [[0.0, 0.0]]
    scores.update(torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, 2.0, -6.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert scores.means(torch.tensor([[0, 1, 2, -1]])).tolist() == [[1.5, -6.0, -1.0, -1.0]]


def test_a_word_not_seen_for_long_keeps_its_mean():
    scores = WordScores([(5,), (6,)])
    measured = torch.ones(1, 1, dtype=torch.bool)
    scores.update(torch.tensor([[0]]), torch.tensor([[2.0]]), measured)
    for _ in range(5000):
        scores.update(torch.tensor([[1]]), torch.tensor([[-1.0]]), measured)
    assert scores.means(torch.tensor([[0]])).item() == pytest.approx(2.0)


def test_processes_add_their_sums(monkeypatch):
    alone, together = WordScores([(5,), (6,)]), WordScores([(5,), (6,)])
    rows, scores = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    measured = torch.ones(2, 2, dtype=torch.bool)
    alone.update(rows, scores, measured)
    # The other process holds the second row: its step is (sums, counts) = ((0, 3), (0, 1)).
    monkeypatch.setattr(word_scores_module, "num_processes", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda step: step.add_(torch.tensor([[0.0, 3.0], [0.0, 1.0]])))
    together.update(rows[:1], scores[:1], measured[:1])
    assert torch.equal(together.sums, alone.sums) and torch.equal(together.counts, alone.counts)


def test_save_and_load_give_the_same_means(pairs, tmp_path):
    scores = WordScores.from_texts(texts(pairs), decay=0.9)
    rows = scores.rows(pairs["input_ids"], pairs["word_ids"])
    scores.update(rows, torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)), rows % 2 == 0)
    settings = {"strategy": "attention", "layer": "0", "weights": "student", "instance_weight": "1"}
    scores.save(tmp_path / "word_scores.safetensors", settings)
    loaded = WordScores.load(tmp_path / "word_scores.safetensors")
    assert loaded.vocabulary == scores.vocabulary and loaded.decay == 0.9
    assert torch.equal(loaded.sums, scores.sums) and torch.equal(loaded.counts, scores.counts)
    assert torch.equal(loaded.rows(pairs["input_ids"], pairs["word_ids"]), rows)
    assert WordScores.settings_in(tmp_path / "word_scores.safetensors") == settings
    for _ in range(4):
        scores.save(tmp_path / "again.safetensors", dict(reversed(settings.items())))
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "word_scores.safetensors").read_bytes()


def test_words_of_another_corpus_are_unseen(pairs):
    scores = WordScores([(1, 2)])
    assert (scores.rows(pairs["input_ids"], pairs["word_ids"]) == -1).all()


def test_an_empty_vocabulary_is_saved_and_looked_up(tmp_path):
    WordScores([]).save(tmp_path / "empty.safetensors")
    loaded = WordScores.load(tmp_path / "empty.safetensors")
    assert loaded.vocabulary == [] and loaded.means(torch.tensor([[-1]])).item() == 0


def test_looking_up_changes_nothing(pairs):
    scores = WordScores.from_texts(texts(pairs))
    before = {name: tensor.clone() for name, tensor in scores.state_tensors().items()}
    scores.means(scores.rows(pairs["input_ids"], pairs["word_ids"]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in scores.state_tensors().items())
