"""Composes the evaluation of one model, or of two side by side: every stage by itself, so that one may fail alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.costs import token_costs
from layer_surgery.checkpoint.heads import CAUSAL_LM, EMBEDDING
from layer_surgery.config import EvaluationConfig
from layer_surgery.data import bundled_tasks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.devices import available_memory_bytes
from layer_surgery.errors import CheckpointError, DataError, UserError, describe
from layer_surgery.evaluation.continuations import continuations, encode_prompt, prompts_from
from layer_surgery.evaluation.distance import FinalStates, check_same_vocabulary
from layer_surgery.evaluation.distance import distance as measure_distance
from layer_surgery.evaluation.embedding import TextVectors
from layer_surgery.evaluation.labelled import LabelOutcome, label_changes, label_outcome
from layer_surgery.evaluation.perplexity import summarise, window_losses
from layer_surgery.evaluation.speed import measure_speed
from layer_surgery.evaluation.task_names import mteb_is_here
from layer_surgery.evaluation.task_outcome import TaskOutcome, paired_tasks
from layer_surgery.evaluation.text_encoder import TextEncoder
from layer_surgery.evaluation.uncertainty import perplexity_change
from layer_surgery.records import Comparison, Continuation, EvaluationResult, Perplexity, StageFailure, TaskResult
from layer_surgery.records.embedding import EmbeddingQuality
from layer_surgery.runs.embedding import EmbeddingTexts
from layer_surgery.runs.session import Session
from layer_surgery.walk.boundaries import Boundary, BoundaryStore
from layer_surgery.walk.share import share_of
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Losses

if TYPE_CHECKING:
    from layer_surgery.evaluation.embedding_tasks import EmbeddingTasks
    from layer_surgery.evaluation.tasks import Tasks

Moment = Literal["before", "unhealed", "after"]

_LOG = logging.getLogger(__name__)
#: Hidden states that wait for the other model take, all together, at most one part in so many of the memory that a walk
#: may take: it works meanwhile.
_WAITING_SHARE = 4


@dataclass
class _Measured:
    """One model, and what a comparison needs of it."""

    session: Session
    checkpoint: Checkpoint
    result: EvaluationResult
    losses: dict[str, Losses] = field(default_factory=dict)
    states: dict[str, Boundary] = field(default_factory=dict)
    labelled: dict[str, LabelOutcome] = field(default_factory=dict)
    vectors: dict[str, TextVectors] = field(default_factory=dict)
    embedding: dict[str, EmbeddingQuality] = field(default_factory=dict)
    tasks: TaskOutcome | None = None
    written: list[str] | None = None
    kept: ExitStack = field(default_factory=ExitStack)


class Evaluator:
    """Measures a model, then perhaps a second one on the same data, and compares them.

    The models are never in memory together, except for their speed. Several models after can be measured in turn, each
    compared with the same one before: `forget("after")` in between. A context manager: frees what it has kept.
    What fails is recorded in `failures`, and the rest goes on; only if the very first measurement fails, when nothing
    can be lost, its error is raised.
    """

    def __init__(
        self, session: Session, config: EvaluationConfig, texts: list[PackedTokens], *, baseline: Session | None
    ) -> None:
        """Check everything that was asked for; raises `UserError` for what cannot work.

        Args:
            session: of the model after.
            texts: what perplexity and distance are measured on.
            baseline: session of the model before (the same in a compression); None if there is none.
        """
        self.failures: list[StageFailure] = []
        self._session, self._config, self._texts = session, config, texts
        self._sessions: dict[Moment, Session] = {"after": session, "unhealed": session}
        if baseline is not None:
            self._sessions["before"] = baseline
        self._measured: dict[Moment, _Measured] = {}
        self._alone = False  # whether the first process is at something that the others wait for
        self._kept = ExitStack()
        self._causal = session.checkpoint.head is CAUSAL_LM
        self._check_heads()
        embeds = session.checkpoint.head is EMBEDDING
        self._embedded_texts = EmbeddingTexts(session, texts) if embeds else None
        self._prompts = self._choose_prompts()
        for each in self._sessions.values():
            self._check(each.checkpoint)
        self._check_memory()
        self._tasks: Tasks | None = None
        self._embedding_tasks: EmbeddingTasks | None = None
        if config.tasks and parallel.is_first():
            session.need_tokenizer()
            # lm-eval and mteb take seconds to import.
            if embeds:
                from layer_surgery.evaluation.embedding_tasks import EmbeddingTasks

                self._embedding_tasks = EmbeddingTasks(config)
            else:
                from layer_surgery.evaluation.tasks import Tasks

                self._tasks = Tasks(config, bundled_tasks())

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._measured.clear()
        self._kept.close()

    @property
    def texts(self) -> list[PackedTokens]:
        """Everything that each model is run on to measure it, but for tasks, speed and continuations."""
        return self._texts if self._embedded_texts is None else self._embedded_texts.all_tokens

    def measure(self, moment: Moment, checkpoint: Checkpoint) -> None:
        """Measure size, perplexity and tasks of one model, and let it continue the prompts."""
        found = size_and_costs(checkpoint, self._config.sequence_length)
        measured = _Measured(self._sessions[moment], checkpoint, found)
        self._kept.enter_context(measured.kept)
        required = not self._measured
        if self._causal:
            perplexities, labelled = self._perplexities(moment, measured, required=required), {}
        else:
            measure = self._labelled if self._embedded_texts is None else self._embedded
            perplexities, labelled = {}, measure(moment, measured, required=required)
        self._measured[moment] = measured
        if self._config.tasks or self._prompts:
            with self._by_first():
                if self._embedded_texts is None:
                    self._run_whole(moment, measured)
                else:
                    self._run_embedding_tasks(moment, measured)
        tasks = measured.tasks.results if measured.tasks is not None else {}
        measured.result = replace(found, perplexity=perplexities, tasks=labelled | tasks, embedding=measured.embedding)

    def compare(self, first: Moment = "before", second: Moment = "after", *, distance: bool = True) -> Comparison:
        """Compare two models that have been measured, on everything that both have.

        `distance` says whether the distance between them is among that.
        """
        before, after = self._measured[first], self._measured[second]
        changes, divergences, agreements = {}, {}, {}
        for tokens in self._texts:
            name = tokens.name
            if name in before.losses and name in after.losses:
                change = perplexity_change(before.losses[name], after.losses[name], self._session.runtime.seed)
                if change is not None:
                    changes[name] = change
            if distance and name in before.states and name in after.states:
                with self._attempt(f"distance on '{name}'", "distance"):
                    old, new = (FinalStates(m.session.stream(m.checkpoint), m.states[name]) for m in (before, after))
                    divergences[name], agreements[name] = measure_distance(old, new, tokens, self._session.settings)
        result = Comparison(perplexity=changes, kl_divergence=divergences, top1_agreement=agreements)
        if before.tasks is not None and after.tasks is not None:
            result = replace(result, tasks=paired_tasks(before.tasks, after.tasks, self._session.runtime.seed))
        changes_of_labels = {
            name: label_changes(before.labelled[name], outcome, self._session.runtime.seed)
            for name, outcome in after.labelled.items()
            if name in before.labelled
        }
        return replace(result, tasks=changes_of_labels | result.tasks)

    def measure_speed(self) -> None:
        """Measure the speed of all measured models, which take turns."""
        if not self._config.speed:
            return
        with self._by_first():
            self._measure_speed()

    def _measure_speed(self) -> None:
        if not parallel.is_first():
            return
        models = list(self._measured.values())
        with self._attempt("speed"):
            points = measure_speed(
                [measured.session.stream(measured.checkpoint).load_whole() for measured in models],
                self._config,
                self._session.ui.progress,
                self._session.runtime.seed,
                generates=self._causal,
            )
            for measured, found in zip(models, points, strict=True):
                measured.result = replace(measured.result, speed=found)

    def result(self, moment: Moment) -> EvaluationResult:
        """Return all that was measured of one model so far."""
        return self._measured[moment].result

    def forget(self, moment: Moment) -> None:
        """Free what is kept of a model, if it was measured, so that another can be measured in its place."""
        if measured := self._measured.pop(moment, None):
            measured.kept.close()

    def side_by_side(self) -> list[Continuation]:
        """Return what the models wrote."""
        before, after = self._measured.get("before"), self._measured["after"]
        if after.written is None or (before is not None and before.written is None):
            return []
        firsts = before.written if before is not None and before.written is not None else [None] * len(after.written)
        return [
            Continuation(prompt=prompt, before=first, after=second)
            for prompt, first, second in zip(self._prompts, firsts, after.written, strict=True)
        ]

    @property
    def _seed(self) -> int:
        return self._session.runtime.seed

    def _perplexities(self, moment: Moment, measured: _Measured, *, required: bool) -> dict[str, Perplexity]:
        if not self._texts:
            return {}
        found: dict[str, Perplexity] = {}
        session = measured.session
        with self._attempt(f"perplexity {moment}", required=required):
            model = session.stream(measured.checkpoint)
            for tokens in self._texts:
                keep = self._new_boundary(model, measured, tokens) if self._distance else None
                losses = window_losses(model, tokens, session.settings, keep)
                found[tokens.name] = summarise(losses, tokens)
                measured.losses[tokens.name] = losses
                if keep is not None:
                    measured.states[tokens.name] = keep
        return found

    def _labelled(self, moment: Moment, measured: _Measured, *, required: bool) -> dict[str, TaskResult]:
        """Measure loss, accuracy and the like on every set of labelled examples (or of masked text)."""
        if not self._texts:
            return {}
        session = measured.session
        with self._attempt(f"labels {moment}", required=required):
            model = session.stream(measured.checkpoint)
            for tokens in self._texts:
                measured.labelled[tokens.name] = label_outcome(model, tokens, session.settings)
        return {name: outcome.result(session.runtime.seed) for name, outcome in measured.labelled.items()}

    def _embedded(self, moment: Moment, measured: _Measured, *, required: bool) -> dict[str, TaskResult]:
        """Embed all texts, and compare a model with the one before; one that is alone, with its own full vectors."""
        found, results = self._embedded_texts, dict[str, TaskResult]()
        assert found is not None
        with self._attempt(f"embeddings {moment}", required=required):
            measured.vectors = found.vectors(measured.session, measured.checkpoint)
        with self._attempt(f"quality of embeddings {moment}", "embeddings"):
            before = measured if moment == "before" else self._measured.get("before")
            for name, vectors in measured.vectors.items():
                if before is not None and before is not measured and name in before.vectors:
                    results[name] = found.nearness(vectors, before.vectors[name])
                    measured.embedding[name] = found.quality(vectors, before.vectors[name], self._seed)
                elif "before" not in self._sessions:
                    measured.embedding[name] = found.quality(vectors, vectors, self._seed)
        return results

    def _run_whole(self, moment: Moment, measured: _Measured) -> None:
        """Run tasks and continuations on the model as a whole, loaded once for both."""
        session, model = measured.session, None
        if not parallel.is_first():
            return
        with self._attempt(f"loading the whole model {moment}", "load"):
            model = session.stream(measured.checkpoint).load_whole()
        if model is None:
            return
        tokenizer = session.need_tokenizer()
        if self._tasks is not None:
            with self._attempt(f"tasks {moment}"):
                measured.tasks = self._tasks.run(model, tokenizer, session.ui.progress)
        if self._prompts:
            with self._attempt(f"continuations {moment}"):
                prompts = [encode_prompt(tokenizer, prompt) for prompt in self._prompts]
                new_tokens = self._config.NEW_TOKENS
                measured.written = continuations(model, tokenizer, prompts, new_tokens, session.ui.progress)

    def _run_embedding_tasks(self, moment: Moment, measured: _Measured) -> None:
        """Run mteb's tasks on an embedding model, which is walked over: one layer at a time in memory."""
        if self._embedding_tasks is None:
            return
        session = measured.session
        with self._attempt(f"tasks {moment}"), parallel.alone():
            model = session.stream(measured.checkpoint)
            encoder = TextEncoder(model, session.need_tokenizer(), session.settings)
            measured.tasks = self._embedding_tasks.run(encoder, session.ui.progress)

    def _check_heads(self) -> None:
        """Raise `CheckpointError` for measurements that a head does not allow."""
        config, kinds = self._config, {each.checkpoint.head.kind for each in self._sessions.values()}
        problems = {each.checkpoint.objective for each in self._sessions.values()}
        if len(kinds) > 1 or len({(each.problem, each.labels) for each in problems}) > 1:
            names = " and ".join(each.checkpoint.name for each in self._sessions.values())
            raise CheckpointError(f"{names} have not the same head and labels, so they cannot be compared.")
        if self._causal:
            return
        embeds = self._session.checkpoint.head is EMBEDDING
        options = {
            "--tasks": config.tasks and not embeds,
            "--num-fewshot": config.num_fewshot is not None and embeds,
            "--limit": config.limit is not None and embeds,
            "--prompt": config.prompts,
            "--continuations": config.continuations,
        }
        asked = [option for option, given in options.items() if given]
        if asked:
            raise CheckpointError(
                f"{' and '.join(asked)} need a causal language model, but {self._session.checkpoint.name} is a "
                f"{self._session.checkpoint.head.words}; leave that out."
            )
        if config.tasks and not mteb_is_here():
            raise UserError("--tasks of an embedding model need mteb, which is not installed: pip install mteb.")

    def _choose_prompts(self) -> list[str]:
        """Return the prompts of the user's, or the beginnings of windows of the first text."""
        config, session = self._config, self._session
        if not self._causal:
            return []
        if config.prompts:
            session.need_tokenizer()
            return list(config.prompts)
        count = config.continuations
        if count is None:
            small = _whole_bytes(session) <= session.resident_bytes
            count = config.DEFAULT_COUNT if small else 0
        if not count or not self._texts:
            return []
        tokenizer = session.need_tokenizer()
        return [
            str(tokenizer.decode(ids, skip_special_tokens=True))
            for ids in prompts_from(self._texts[0], count, config.PROMPT_TOKENS)
        ]

    def _check(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` if a stage that was asked for cannot work on this model."""
        if self._distance and self._texts:
            check_same_vocabulary(self._session.checkpoint, checkpoint)
        config, longest = self._config, checkpoint.longest_sequence
        needed = max(config.speed_lengths) + (config.speed_new_tokens if self._causal else 0)
        if config.speed and longest is not None and needed > longest:
            raise DataError(
                f"--speed-lengths{' and --speed-new-tokens' * self._causal} make {needed} tokens, but "
                f"{checkpoint.name} takes at most "
                f"{longest}; choose shorter ones."
            )

    def _check_memory(self) -> None:
        """Tasks, speed and continuations need the whole model in memory; surgery, perplexity and vectors do not."""
        session = self._session
        tasks = self._config.tasks and self._embedded_texts is None
        options = {"--tasks": tasks, "--speed": self._config.speed, "--continuations": self._prompts}
        asked = [option for option, given in options.items() if given]
        if not asked or not parallel.is_first():
            return
        sizes = [_whole_bytes(each) for moment, each in self._sessions.items() if moment != "unhealed"]
        needed = sum(sizes) if self._config.speed else max(sizes)
        available = available_memory_bytes(session.device)
        if available is not None and needed > available:
            raise CheckpointError(
                f"{' and '.join(asked)} need whole models in memory, here {needed:,} bytes, but {available:,} are "
                "available; leave out these options, or pass --dtype bfloat16 or another --device."
            )

    @property
    def _distance(self) -> bool:
        return self._causal and self._config.distance and "before" in self._sessions

    def _new_boundary(self, model: StreamedModel, measured: _Measured, tokens: PackedTokens) -> Boundary:
        sequences = share_of(tokens, measured.session.runtime.batch_size).tokens.sequences
        shape = (sequences, tokens.sequence_length, model.hidden_size)
        memory = measured.session.boundary_bytes // _WAITING_SHARE // (2 * len(self._texts))
        # In the scratch directory of the evaluator's own session, which lives as long as it.
        store = BoundaryStore(shape, model.dtype, model.device, memory, self._session.scratch)
        return Boundary(measured.kept.enter_context(store), 0)

    @contextmanager
    def _by_first(self) -> Iterator[None]:
        """Tell the other processes which failures the first one records in the block, where it works alone."""
        known = len(self.failures)
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
        found = parallel.from_first(lambda: [asdict(failure) for failure in self.failures[known:]])
        self.failures[known:] = [StageFailure(**failure) for failure in found]

    @contextmanager
    def _attempt(self, stage: str, clock: str | None = None, *, required: bool = False) -> Iterator[None]:
        """Record a failure of the block, and go on; raise it if the block is `required`."""
        with self._session.clock.stage((clock or stage).replace(" ", "_")):
            try:
                yield
            except Exception as error:
                if required or not (parallel.in_step(error) or self._alone):
                    raise
                _LOG.debug("%s failed", stage, exc_info=True)
                self.failures.append(StageFailure(stage=stage, error=describe(error)))
                self._session.ui.note(f"{stage} failed: {describe(error)}")


def _whole_bytes(session: Session) -> int:
    return session.checkpoint.parameters * session.dtype.itemsize


def size_and_costs(checkpoint: Checkpoint, context: int) -> EvaluationResult:
    """Return what can be said of a model without running it; operations are counted behind `context` tokens."""
    costs = token_costs(checkpoint, context)
    return EvaluationResult(
        layers=checkpoint.layer_count,
        parameters=checkpoint.parameters,
        size_bytes=checkpoint.size_bytes,
        kv_cache_bytes_per_token=costs.kv_cache_bytes,
        flops_per_token=costs.flops,
        flops_context_tokens=context,
    )
