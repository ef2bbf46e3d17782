"""Made chat dialogues that teach a small language model to answer, to copy and to look things up in context.

They use the questions and answers of the made pictures, clips and speech, word for word, so that an adapter
has only to bring the sense in: the frozen language model knows the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from random import Random

from . import clips, scenes
from .english import english_documents
from .facts import Fact, facts, vocabulary
from .words import (
    COLOURS,
    NUMBERS,
    PLACE_NAMES,
    SHAPES,
    SIZES,
    WRITTEN_WORDS,
    Question,
    plural,
    typed,
)

__all__ = [
    "COPY_PROMPT",
    "DESCRIBE_CLIP",
    "DESCRIBE_OBJECTS",
    "DESCRIBE_PICTURE",
    "dialogues",
    "english_documents",
    "new_question",
    "sentence",
    "word_salad",
]

COPY_PROMPT = "Repeat after me in English:"
"""The system prompt that asks for a transcript instead of an answer."""
DESCRIBE_PICTURE = "describe the picture"
DESCRIBE_OBJECTS = "describe every object"
DESCRIBE_CLIP = "describe the clip"

Message = dict[str, str]


def dialogues(rng: Random, count: int) -> Iterator[list[Message]]:
    """`count` dialogues of one to six turns, each a list of messages of the dialog schema, text only."""
    makers, weights = zip(*_MAKERS, strict=True)
    for maker in rng.choices(makers, weights=weights, k=count):
        messages = maker(rng)
        # Speech is always copied from before pauses. Where one text in five had them, 3% of the words were copied
        # wrongly, most of them over and over; with half of the texts 0.5% are.
        if rng.random() < (0.5 if maker is _copy else 0.2):
            for message in messages:
                if message["role"] == "user" and len(message["content"].split()) <= 12:
                    message["content"] = before_pause(message["content"], rng)
        yield messages


def new_question(rng: Random) -> tuple[list[Message], Question]:
    """A dialogue of one question, for tests: any fact, or a scene or clip that no training text describes."""
    match rng.choice(("fact", "scene", "clip")):
        case "fact":
            fact = rng.choice(facts())
            asked = Question(
                kind=fact.kind, question=rng.choice(fact.phrasings), answer=fact.answer, choices=fact.choices
            )
            return _asked(asked, rng), asked
        case "scene":
            scene = scenes.sample_scene(rng, "text new")
            description, asked = scenes.caption(scene), scenes.questions(scene, rng)[0]
        case _:
            clip = clips.sample_clip(rng, "text new")
            description, asked = clips.caption(clip), clips.questions(clip, rng)[0]
    return _described(description, [asked], rng), asked


def sentence(rng: Random, *, held_out_facts: bool = False) -> str:
    """A sentence as it may be spoken: a statement on a scene or clip, any question, or a word salad.

    Lower-case words without punctuation. Facts that are held out of training speech are asked only on demand.
    """
    return rng.choices(_SENTENCES, weights=(3, 2, 3, 1.5, 2, 2))[0](rng, held_out_facts).replace(",", "")


def dictation(rng: Random) -> str:
    """What training speech says to be written down: words at random, so that each is heard often; questions with one
    word changed, mostly the last, on which the answer hangs, so that it has to be heard and cannot be guessed from
    those before it; and sentences. Never the question of a held-out fact."""
    while True:
        match rng.choices(("words", "changed", "sentence"), weights=(4, 3, 3))[0]:
            case "words":
                text = word_salad(rng, 3, 6)
            case "changed":
                words = rng.choice(rng.choice(facts()).phrasings).split()
                words[rng.choice((-1, -1, rng.randrange(len(words))))] = rng.choice(spoken_vocabulary())
                text = " ".join(words)
            case _:
                text = sentence(rng)
        if text not in _held_out_questions():
            return text


@cache
def _held_out_questions() -> frozenset[str]:
    return frozenset(phrasing for fact in facts() if fact.held_out for phrasing in fact.phrasings)


def recitation(rng: Random) -> str:
    """A few random words said over and over. Attention heads that copy form on such text within half a million
    tokens, all at once, if hardly anything else is learned meanwhile; as a third of a mixture it had taught no copying
    after 0.6 million. Transcription and every question on a description need them."""
    words = word_salad(rng, 3, 8)
    return " ".join([words] * (32 // len(words.split())))


def word_salad(rng: Random, shortest: int = 2, longest: int = 6) -> str:
    return " ".join(rng.choices(spoken_vocabulary(), k=rng.randint(shortest, longest)))


@cache
def spoken_vocabulary() -> tuple[str, ...]:
    """Every word that made speech may hold."""
    words = {
        *vocabulary(),
        *(*COLOURS, *SHAPES, *SIZES, *WRITTEN_WORDS, *NUMBERS),
        *(word for place in PLACE_NAMES for word in place.split()),
        *(plural(shape) for shape in SHAPES),
        *["object", "objects", "things", "place", "size", "word", "written", "there", "see", "that", "or", "at"],
        *["from", "to", "where", "are", "goes", "go", "moves", "move", "stays", "happens", "then", "start", "end"],
    }
    return tuple(sorted(words))


PAUSE = "."
"""With the space before it, the blank of the speech recipes."""


def before_pause(text: str, rng: Random) -> str:
    """The words before a row of pauses. Speech comes to the language model at so many soft tokens a second, those that
    hold no word last, and so it knows to stop at them."""
    return " ".join([text, *[PAUSE] * rng.randint(1, 24)])


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _asked(question: Question, rng: Random) -> list[Message]:
    return [_user(typed(question.question, rng)), _assistant(question.sentence)]


@cache
def _arithmetic_and_other() -> tuple[list[Fact], list[Fact]]:
    sums = [fact for fact in facts() if fact.kind in ("sum", "difference")]
    return sums, [fact for fact in facts() if fact.kind not in ("sum", "difference")]


def _fact_dialogue(rng: Random, options: Sequence[Fact]) -> list[Message]:
    messages = []
    for fact in rng.choices(options, k=rng.choice((1, 2, 3, 4))):
        messages += [_user(typed(rng.choice(fact.phrasings), rng)), _assistant(fact.answer)]
    return messages


def _arithmetic(rng: Random) -> list[Message]:
    return _fact_dialogue(rng, _arithmetic_and_other()[0])


def _knowledge(rng: Random) -> list[Message]:
    return _fact_dialogue(rng, _arithmetic_and_other()[1])


_SMALL_TALK = (
    (("hello", "hi", "good morning", "good evening", "hello there"), "hello! how can i help you?"),
    (("who are you", "what is your name", "what are you called", "tell me your name"), "i am Herd."),
    (("what are you", "are you a person"), "i am Herd, a small model that can read, see and hear."),
    (("how are you", "how are you today"), "i am well, thank you."),
    (("what can you do", "how can you help me"), "i can read, see and hear, and i answer questions."),
    (("thank you", "thanks", "thanks a lot"), "you are welcome."),
    (("goodbye", "bye", "see you"), "goodbye!"),
)


def _talk(rng: Random) -> list[Message]:
    messages = []
    for forms, answer in rng.sample(_SMALL_TALK[:-1], rng.choice((1, 2, 3))):
        text = rng.choice(forms)
        if "?" in answer or answer.startswith("you"):
            messages += [_user(text), _assistant(answer)]
        else:
            messages += [_user(typed(text, rng)), _assistant(answer)]
    if rng.random() < 0.3:
        messages += [_user(rng.choice(_SMALL_TALK[-1][0])), _assistant(_SMALL_TALK[-1][1])]
    return messages


def _copy(rng: Random) -> list[Message]:
    match rng.choices(("sentence", "words", "few words"), weights=(11, 5, 4))[0]:
        case "sentence":
            text = sentence(rng)
        case "words":
            text = word_salad(rng, 2, 10)
        case _:
            # What followed a word the last time does not say what comes now: without such texts "two plus two" is
            # copied as "two plus two plus two plus ...".
            words = rng.sample(spoken_vocabulary(), rng.randint(2, 3))
            text = " ".join(rng.choices(words, k=rng.randint(3, 8)))
    return [{"role": "system", "content": COPY_PROMPT}, _user(text), _assistant(text)]


def _described(description: str, questions: Sequence[Question], rng: Random) -> list[Message]:
    """The description stands where a picture or clip will stand: before the first question."""
    first, *rest = [_asked(question, rng) for question in questions]
    first[0] = _user(f"{description}. {first[0]['content']}")
    return [message for turn in (first, *rest) for message in turn]


def _scene(rng: Random) -> list[Message]:
    scene = scenes.sample_scene(rng, "text")
    text = scenes.caption(scene)
    match rng.choices(("questions", "objects", "picture"), weights=(6, 3, 1))[0]:
        case "objects":
            return [_user(f"{text}. {DESCRIBE_OBJECTS}"), _assistant(scenes.statements(scene, rng))]
        case "picture":
            return [_user(f"{text}. {DESCRIBE_PICTURE}"), _assistant(text)]
    chosen = scenes.questions(scene, rng)[:4]
    return _described(text, chosen, rng)


def _clip(rng: Random) -> list[Message]:
    clip = clips.sample_clip(rng, "text")
    if rng.random() < 0.06:
        text = clips.caption(clip)
        return [_user(f"{text}. {DESCRIBE_CLIP}"), _assistant(text)]
    return _described(clips.caption(clip), clips.questions(clip, rng)[:3], rng)


_MAKERS: tuple[tuple[Callable[[Random], list[Message]], float], ...] = (
    (_arithmetic, 0.08),
    (_knowledge, 0.14),
    (_talk, 0.03),
    (_copy, 0.24),
    (_scene, 0.37),
    (_clip, 0.14),
)


def _scene_statement(rng: Random, held_out_facts: bool) -> str:
    one = rng.choice(scenes.sample_scene(rng, "text").objects)
    form = rng.choice(("there is a {size} {name} {where}", "the {name} is {where}", "a {size} {name} {where}"))
    return form.format(size=one.size, name=one.name, where=one.where)


def _clip_statement(rng: Random, held_out_facts: bool) -> str:
    clip = clips.sample_clip(rng, "text")
    return clips.statement(clip, rng.choice(clip.movements))


def _scene_question(rng: Random, held_out_facts: bool) -> str:
    return scenes.questions(scenes.sample_scene(rng, "text"), rng)[0].question


def _clip_question(rng: Random, held_out_facts: bool) -> str:
    return clips.questions(clips.sample_clip(rng, "text"), rng)[0].question


def _fact_question(rng: Random, held_out_facts: bool) -> str:
    while True:
        fact = rng.choice(facts())
        if held_out_facts or not fact.held_out:
            return rng.choice(fact.phrasings)


def _salad(rng: Random, held_out_facts: bool) -> str:
    return word_salad(rng)


_SENTENCES: tuple[Callable[[Random, bool], str], ...] = (
    _scene_statement,
    _clip_statement,
    _scene_question,
    _clip_question,
    _fact_question,
    _salad,
)
