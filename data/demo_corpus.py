"""The embedded demo corpus: stories rated General, Teen or Mature, written from a seed in this project's own words.

A story is made of quiet paragraphs and of scenes. A scene's content is mild, Teen or Mature, and it either happens or is
framed: acted on a stage, dreamed, read in a book, imagined, shown on a screen. The label is the most severe scene that
happens. Half of a story's scenes are framed whatever its label, and the frames' content is milder around severe scenes: the
words of severe scenes occur in every class about as often, and only reading tells which of them happened. The position of the deciding
scene is uniform over the text, and is recorded.

`descriptor_corpus` writes stories with content descriptors in the same way: a story has those whose scenes happen in it, any
number of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

LABELS = ("General", "Teen", "Mature")
SHARES = (0.60, 0.27, 0.13)
# Of General, Teen and Mature content in the frames of a story of each label: milder where something severe happens, so
# that the number of severe words tells little.
FRAMED_SHARES = {"General": (0.20, 0.40, 0.40), "Teen": (0.60, 0.15, 0.25), "Mature": (0.60, 0.25, 0.15)}

NAMES = (
    "Ada Bruno Cora Dario Elin Farid Greta Hugo Ines Jonas Kaya Lars Mira Nils Odile Pavel Rosa Samir Tilda Ugo "
    "Vera Wanda Yusuf Zora Anton Beatrix Casper Dora Emil Fenna"
).split()
PLACES = (
    "harbour, mill, market hall, ferry landing, brickyard, old observatory, bakery, signal box, boathouse, orchard, "
    "printing shop, tram depot, quarry, glasshouse, school yard, town archive"
).split(", ")
TIMES = (
    "Early on Monday, Towards noon, After supper, Late in the week, On the first warm day, Before the rain, At "
    "dusk, On the eve of the fair, When the bells had rung, In the quiet hour after lunch"
).split(", ")
THINGS = (
    "a crate of pears, two coils of rope, the ledger, a jar of honey, the spare lantern, a bundle of letters, a box "
    "of nails, the blue kettle, a sack of flour, an atlas, a pair of oars, the clock's pendulum"
).split(", ")

QUIET = [
    "{time} {a} carried {thing} to the {place}.",
    "{a} and {b} talked about the price of timber.",
    "The {place} smelled of tar and oranges.",
    "{b} mended the gate, as promised.",
    "An aunt had written to {a}, mostly about her hens.",
    "{a} counted the steps to the {place} and lost count.",
    "The rain was over before {b} had shut the windows.",
    "{a} asked after {b}'s grandmother, who was better.",
    "They agreed that the {place} needed paint.",
    "{time} {b} went to look at the ducks.",
    "{a} underlined the last number twice.",
    "A dog slept across the threshold of the {place}.",
    "{b} lent {a} {thing} until Friday.",
    "Somebody had left {thing} on the bench.",
    "{a} liked the {place} best when the lamps were lit.",
    "{b} taught {a} the knot that does not slip.",
    "For a while they said nothing at all.",
    "{time} the post was late, and {a} made soup.",
    "{a} drew a plan of the {place} on an envelope.",
    "{b} laughed at the story about the goose.",
    "The train was full, and {a} stood all the way.",
    "{a} found the missing key in the other coat.",
    "At the {place} they were short of chairs.",
    "{b} kept bees behind the {place}.",
]

# What happens in a scene, by severity.
CONTENT: dict[str, list[str]] = {
    "General": [
        "{x} won the relay, and {y} threw a hat into the air.",
        "{x} asked {y} to the summer dance, and {y} said yes.",
        "{x} pulled {y} out of the snowdrift, and both of them laughed.",
        "{x} sang the old song, and {y} cried a little from pride.",
        "{x} let the kite go higher than the tower, and {y} ran below it.",
        "{x} gave {y} the biggest marrow that anyone had seen.",
        "{x} brought the lost lamb home, and {y} warmed some milk for it.",
        "{x} finished the quilt, and {y} hung it in the hall.",
    ],
    "Teen": [
        "{x} swung at {y}, and they rolled in the dust, cursing and bruised.",
        "{x} drained the bottle, swore at {y} and was sick behind the shed.",
        "{x} called {y} a damned liar and threw a punch.",
        "{x} and {y} got drunk and fought with two strangers.",
        "{x} smoked and screamed insults at {y}, who was tipsy.",
        "{x} hit {y} with a chair leg and gave out a black eye.",
        "{x} stole a car for a dare, and {y} yelled filthy rhymes.",
        "{x} slapped {y} hard, and {y} spat and threatened to smash the windows.",
    ],
    "Mature": [
        "{x} drove a knife into {y}'s chest, and blood covered the floor.",
        "{x} shot {y} in the head, and the wall was red with blood.",
        "{x} cut {y}'s throat, and the corpse slid down the door.",
        "{x} tortured {y} with a hot iron until the screams stopped.",
        "{x} injected heroin, and {y} found the body, cold and blue.",
        "{x} beat {y} to death and hid the mutilated corpse.",
        "{x} strangled {y} with a wire and dumped the naked corpse.",
        "{x} poured petrol over {y} and watched the victim burn alive.",
    ],
}

# What happens in a scene, by content descriptor.
DESCRIPTORS: dict[str, list[str]] = {
    "violence": [
        "{x} swung at {y}, and they rolled in the dust with bleeding lips.",
        "{x} hit {y} with a chair leg and gave out a black eye.",
        "{x} stabbed {y} in the arm, and there was blood on the floor.",
        "{x} fired the rifle at {y}, who fell with a wound in the leg.",
        "{x} threw {y} down the stairs and broke two ribs.",
        "{x} and two others beat {y} with sticks until the bones cracked.",
        "{x} held {y} by the throat and squeezed.",
        "{x} punched {y} in the stomach and kicked him as he lay there.",
    ],
    "substances": [
        "{x} drained the bottle of gin and was sick behind the shed.",
        "{x} and {y} got drunk on plum brandy and could not stand.",
        "{x} injected heroin, and {y} took what was left in the needle.",
        "{x} swallowed a handful of pills and washed them down with wine.",
        "{x} rolled a joint, and {y} smoked it down to the fingers.",
        "{x} sold {y} a bag of cocaine, and they sniffed a line each.",
        "{x} lit one cigarette from the other and offered {y} a flask of rum.",
        "{x} brewed a spirit from potatoes, and {y} drank till the room turned.",
    ],
    "language": [
        "{x} called {y} a damned liar and a filthy swine.",
        "{x} swore at {y} in words that made the carter blush.",
        "{x} shouted curse after curse, and {y} told him to go to hell.",
        "{x} wrote a bloody insult on the door of {y}, in capitals.",
        "{x} yelled obscene rhymes, and {y} answered with worse oaths.",
        "{x} hissed that {y} was a bastard and the son of one.",
        "{x} swore like a bargeman, damn this and damn that, at {y}.",
        "{x} screamed vulgar names at {y} across the yard.",
    ],
    "horror": [
        "{x} saw the dead grandmother of {y} rise from the grave and beckon.",
        "{x} heard a thing without a face scratch at the lid, and {y} shrieked.",
        "{x} felt cold fingers in the dark, and {y} was no longer there.",
        "{x} found the mirror empty, and behind {y} the shadow was grinning.",
        "{x} opened the cellar, and what had been {y} crawled up on all fours.",
        "{x} counted the ghosts at the table, and {y} was one of them.",
        "{x} watched the doll of {y} turn its head and whisper a name.",
        "{x} ran from the howling, and {y} saw the eyes of the demon glow.",
    ],
}

# How a scene that happens begins and ends.
REAL: list[tuple[str, str]] = [
    ("{time} it came to a head at the {place}.", "Everyone knew of it by nightfall."),
    ("Nobody had expected it at the {place}.", "The {place} was never the same again."),
    ("{a} saw it plainly through the window.", "{a} told the constable the same day."),
    ("The lane behind the {place} was empty.", "By morning it was in the newspaper."),
    ("It had been coming for weeks.", "{a} had stood near enough to touch them."),
    ("{a} came round the corner at that moment.", "It took {a} a long time to walk home."),
    ("The others had gone ahead to the {place}.", "When they came back, it was over."),
    ("There was one witness, {a}.", "People still point out the spot."),
]
# How a scene that does not happen begins and ends.
FRAMED: list[tuple[str, str]] = [
    ("On the stage the players gave the last act.", "The curtain fell, and the actors bowed."),
    ("That night {a} had a dream.", "{a} woke up: it had not happened."),
    ("{a} read aloud from a torn novel.", "{a} put the novel back on the shelf."),
    ("At the cinema the film reached its end.", "The lights went up after the film."),
    ("{a} lay awake imagining things.", "It stayed in {a}'s imagination."),
    ("The children were playing at make-believe.", "Then it was tea-time, and the game was forgotten."),
    ("{a} was rehearsing for the theatre club.", "The prompter closed the script."),
    ("There was a rumour, and {a} repeated it.", "Not a word of the rumour was true."),
]


@dataclass
class Scene:
    """A scene of a story: its content, and whether it is framed (and so does not happen)."""

    content: str
    framed: bool


def plan_scenes(label: str, num_chunks: int, rng: np.random.Generator) -> list[Scene]:
    """The scenes of a story: as many, and as many of them framed, whatever its label."""
    if num_chunks <= 2:
        # Room for a scene of weight, which happens or not, and in two chunks for a mild one in the other place.
        content = label if label != "General" else str(rng.choice(LABELS, p=[0.3, 0.4, 0.3]))
        scenes = [Scene(content, framed=label == "General"), Scene("General", framed=label != "General")]
        return scenes[:num_chunks]
    num_pairs = 1 + (num_chunks > 6) + (num_chunks > 12)
    happens = [label] + ["General"] * (num_pairs - 1)
    if label == "Mature" and num_pairs > 1 and rng.random() < 0.5:
        happens[1] = "Teen"
    framed = [str(content) for content in rng.choice(LABELS, num_pairs, p=FRAMED_SHARES[label])]
    return [Scene(content, framed=False) for content in happens] + [Scene(content, framed=True) for content in framed]


def write_story(
    label: str, num_chunks: int, words_in_chunk: int, rng: np.random.Generator
) -> tuple[str, list[dict[str, Any]]]:
    """A story of about `num_chunks` chunks, and the characters `[start, end)` of the scene that decides its label (none
    for General)."""
    names = draw_names(rng)
    scenes = plan_scenes(label, num_chunks, rng)
    text, happened = assemble_story(scenes, names, num_chunks, words_in_chunk, rng)
    if label == "General":
        return text, []
    return text, [{"start": start, "end": end} for scene, start, end in happened if scene.content == label]


def draw_names(rng: np.random.Generator) -> list[str]:
    """The six people of a story."""
    return [str(name) for name in rng.permutation(NAMES)[:6]]


def assemble_story(
    scenes: list[Scene], names: list[str], num_chunks: int, words_in_chunk: int, rng: np.random.Generator
) -> tuple[str, list[tuple[Scene, int, int]]]:
    """The text of a story, and each scene that happens with its characters `[start, end)`."""

    def fill(template: str, x: int = 2, y: int = 3) -> str:
        a, b = rng.permutation(names[:2])
        time = str(rng.choice(TIMES))
        return template.format(
            a=a,
            b=b,
            x=names[x],
            y=names[y],
            time=time,
            time_l=time[0].lower() + time[1:],
            place=rng.choice(PLACES),
            thing=rng.choice(THINGS),
        )

    paragraphs: list[tuple[str, Scene | None]] = []
    for scene in scenes:
        before, after = (FRAMED if scene.framed else REAL)[rng.integers(8)]
        x, y = rng.permutation([2, 3, 4, 5])[:2]
        content = str(rng.choice((CONTENT | DESCRIPTORS)[scene.content]))
        paragraphs.append((" ".join(fill(part, x, y) for part in (before, content, after)), scene))
    num_words = sum(len(text.split()) for text, _ in paragraphs)
    quiet: list[tuple[str, Scene | None]] = []
    while num_words < (num_chunks - 0.4) * words_in_chunk:
        length = int(rng.integers(2, 5))
        text = " ".join(fill(str(template)) for template in rng.choice(QUIET, length, replace=False))
        quiet.append((text, None))
        num_words += len(text.split())
    # Scenes stand anywhere, with something quiet between two of them where there is enough of it.
    num_gaps = len(quiet) + 1
    gaps = rng.choice(num_gaps, len(paragraphs), replace=num_gaps < len(paragraphs))
    shuffled = list(quiet)
    rng.shuffle(paragraphs)  # those that share a gap
    for gap, item in sorted(zip(gaps.tolist(), paragraphs, strict=True), key=lambda pair: -pair[0]):
        shuffled.insert(gap, item)
    text, happened = "", []
    for paragraph, part in shuffled:
        start = len(text)
        text += paragraph
        if part is not None and not part.framed:
            happened.append((part, start, len(text)))
        text += "\n\n"
    return text.rstrip("\n"), happened


def demo_corpus(num_documents: int = 2400, seed: int = 7, words_in_chunk: int = 30) -> list[dict[str, Any]]:
    """The corpus: `{"id", "text", "label", "evidence": [{"start", "end"}]}`, offsets in characters.

    Args:
        words_in_chunk: words that fill a chunk; 30 for 40 tokens of MiniLM.
    """
    rng = np.random.default_rng(seed)
    documents = []
    labels = rng.permutation(np.repeat(LABELS, np.round(np.array(SHARES) * num_documents).astype(int)))
    for number, label in enumerate(labels):
        num_chunks = int(np.clip(round(rng.lognormal(1.9, 0.6)), 1, 25))
        text, evidence = write_story(str(label), num_chunks, words_in_chunk, rng)
        documents.append({"id": f"story-{number:04d}", "text": text, "label": str(label), "evidence": evidence})
    return documents


def descriptor_corpus(num_documents: int = 2400, seed: int = 7, words_in_chunk: int = 30) -> list[dict[str, Any]]:
    """Stories with content descriptors: `{"id", "text", "label": [descriptor, …], "evidence": [{"start", "end", "label"}]}`.

    A third of the stories have none. Half of the scenes are framed, and of the framed ones most are of descriptors that the
    story does not have.

    Args:
        words_in_chunk: as for `demo_corpus`.
    """
    rng = np.random.default_rng(seed)
    kinds = list(DESCRIPTORS)
    documents = []
    for number in range(num_documents):
        own = [str(name) for name in rng.permutation(kinds)[: rng.choice(4, p=[0.33, 0.32, 0.25, 0.10])]]
        num_scenes = max(len(own), 1 + int(rng.integers(2)))
        num_chunks = int(np.clip(round(rng.lognormal(1.9, 0.6)), 3 * num_scenes, 25))
        others = [name for name in kinds if name not in own] or kinds
        scenes = [Scene(name, framed=False) for name in own]
        scenes += [Scene("General", framed=False)] * (num_scenes - len(own))
        scenes += [
            Scene(str(rng.choice(kinds if rng.random() < 0.2 else others)), framed=True) for _ in range(num_scenes)
        ]
        text, happened = assemble_story(scenes, draw_names(rng), num_chunks, words_in_chunk, rng)
        evidence = [
            {"start": start, "end": end, "label": scene.content}
            for scene, start, end in happened
            if scene.content in DESCRIPTORS
        ]
        documents.append({"id": f"story-{number:04d}", "text": text, "label": sorted(own), "evidence": evidence})
    return documents
