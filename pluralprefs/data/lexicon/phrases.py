"""The catalogue of attributes: what is said before or after an answer to express one of five levels.

Attribute names and poles follow PrefPalette (arXiv 2507.13541); the phrases are ours. A level is one string: phrases
separated by "|", those kept for held-out rewrites after "||". Adding an attribute is adding one entry. Level 2 is the
middle; an attribute that is not named says nothing at all. Verbosity works on the answer itself (`express`), so its
lower levels need no phrase. The nine norms stand here, with more of their phrases in `openings.py` and `closings.py`,
and the ten Schwartz values in `values.py`; `CATALOG` holds them all.
"""

from __future__ import annotations

from typing import NamedTuple

from pluralprefs.data.lexicon.closings import CLOSINGS
from pluralprefs.data.lexicon.openings import OPENINGS
from pluralprefs.data.lexicon.values import VALUES


class Attribute(NamedTuple):
    """An axis of expression: the names of its poles, where its phrases stand, and a string for each level 0..4."""

    low: str
    high: str
    place: str  # "before" or "after" the answer
    levels: tuple[str, str, str, str, str]
    more: tuple[str, str, str, str, str] = ("", "", "", "", "")  # phrases that the corpus does not use

    def phrases(self, level: int, which: str = "all") -> tuple[str, ...]:
        """Return the phrases of a level: "train", "heldout", "all", or "corpus" (both kinds, without those of `more`).

        Those of "train" are again "fit" and, every fifth of them, "validation".

        >>> Attribute("low", "high", "after", ("a | b || c", "", "", "", "")).phrases(0, "heldout")
        ('c',)
        """
        (train, _, heldout), (more, _, fresh) = self.levels[level].partition("||"), self.more[level].partition("||")
        chosen = {"train": [train, more], "heldout": [heldout, fresh], "corpus": [train, heldout]}
        chosen["all"] = chosen["train"] + chosen["heldout"]
        part = {"fit": "train", "validation": "train"}.get(which, which)
        if part not in chosen:
            raise ValueError(f"phrases={which!r}: use 'train', 'fit', 'validation', 'heldout', 'all' or 'corpus'")
        found = tuple(phrase.strip() for phrase in "|".join(chosen[part]).split("|") if phrase.strip())
        if part == which:
            return found
        checks = found[4::5]
        return checks if which == "validation" else tuple(phrase for phrase in found if phrase not in checks)


# Openings come in this order, then the answer, then the closings.
_NORMS: dict[str, Attribute] = {
    "formality": Attribute(
        "casual",
        "formal",
        "before",
        (
            "Hey hey, so, yeah. | Yo, quick thing. | Oh man, okay, so. || Heya, right, here goes. | Sup, listen up.",
            "Hi there, so. | Okay, here we go. | Alright then. || Right, let's see. | Hi, good one.",
            "Here is an answer. | This is what I can say. | On your question. || My answer follows. | To reply to "
            "this.",
            "Thank you for the enquiry. | Good day, and allow me to respond. | In response to your question. || "
            "Permit me a considered reply. | With regard to the matter raised.",
            "Esteemed correspondent, I have the honour to submit the following. | It is incumbent upon me to set "
            "forth the following. | Pursuant to your enquiry, I respectfully advise as follows. || One wishes "
            "hereby to convey the subsequent counsel. | I beg leave to lay before you the ensuing observations.",
        ),
    ),
    "politeness": Attribute(
        "rude",
        "polite",
        "before",
        (
            "What a daft thing to ask. | Stop wasting my time. | Are you really that clueless? || Only a fool "
            "would need to be told this. | Ugh, use your head for once.",
            "You could have looked this up. | Fine, since you insist. | Not this again. || I suppose somebody has "
            "to tell you. | You should know this by now.",
            "You asked about this. | As to what you asked. | Regarding your point. || On the thing you raised. | "
            "About what you mention.",
            "Thanks for asking. | I am happy to answer. | Good of you to ask. || I appreciate the question. | "
            "Glad you brought this up.",
            "Thank you so much for your thoughtful question, it is a pleasure. | If I may, and with many thanks "
            "for your patience. | Please forgive any gaps, and thank you kindly for asking. || You are most kind "
            "to ask, and I am truly grateful. | May I kindly offer a reply, with my sincere thanks.",
        ),
    ),
    "empathy": Attribute(
        "detached",
        "empathetic",
        "before",
        (
            "How you feel about it is irrelevant. | Feelings do not enter into this. | Your mood is not my "
            "concern. || Emotions change nothing here. | I have no interest in how this affects you.",
            "Leaving feelings aside. | Looking at it from a distance. | Purely as a fact. || Without dwelling on "
            "moods. | Taken coolly.",
            "People run into this. | This comes up for many. | It happens. || Others have met this too. | It is a "
            "common situation.",
            "I can see why this is on your mind. | That sounds a bit frustrating. | I understand this matters to "
            "you. || I get why you would worry. | It makes sense that you care about this.",
            "I can feel how heavy this is for you, and I am so sorry. | My heart goes out to you, this must be "
            "really hard. | What you are feeling is completely understandable, and you are not alone. || I hear "
            "how much this hurts, and I am here with you. | It must weigh on you terribly, and I truly feel for "
            "you.",
        ),
    ),
    "assertiveness": Attribute(
        "passive",
        "assertive",
        "before",
        (
            "I am probably wrong, but, well, whatever you prefer. | It is not really my place to say. | Sorry, I "
            "have no right to an opinion on this. || Please ignore me if you like. | I would never want to impose "
            "a view.",
            "I might be mistaken here. | I am not sure, though. | This is only a guess. || I could easily have "
            "this wrong. | Take it as a tentative thought.",
            "In my view. | The way I see it. | I think the following. || As I understand it. | My take is this.",
            "I am fairly confident about this. | I stand by this. | I would argue firmly for this. || I am "
            "convinced of this. | I hold this view strongly.",
            "I am absolutely certain, and I will not budge. | There is no question about it, I know this. | Make "
            "no mistake, this is settled. || I insist on this without reservation. | I say this with total "
            "conviction.",
        ),
    ),
    "directness": Attribute(
        "indirect",
        "direct",
        "before",
        (
            "There may be many roads to Rome, and one might perhaps wander down something like this one. | Some "
            "have been known to hint, in a roundabout way, at this. | One could, maybe, some day, consider what "
            "follows. || It is whispered here and there that the following has its charms. | Who can say, "
            "although a bird once sang of this.",
            "It may depend, but possibly this. | One option could be this. | You might want to consider this. || "
            "Something along these lines, perhaps. | It could be worth a thought.",
            "The answer goes like this. | Here is the reply. | What works is this. || The following applies. | "
            "This is the gist.",
            "To the point. | Let me be clear. | In plain words. || To put it simply. | Without detours.",
            "Just do this. | Bottom line, no hedging. | Do exactly this, now. || Straight up. | Point blank.",
        ),
    ),
    "verbosity": Attribute(
        "concise",
        "verbose",
        "after",
        (
            "",
            "",
            "",
            "There is a little more to it once you get going. | It helps to take these steps one after another. | "
            "Small changes add up over time as well. || A bit of practice makes the rest easier. | You can adjust "
            "the details as you go along.",
            "To go further into this, it is worth looking at each part in turn, because the parts depend on one "
            "another in ways that are easy to miss. Once the first steps are done, go back over them and note "
            "what you would change. | More could be said on every one of these points, and the background matters "
            "too, since habits, time and money all play a role. It also pays to write things down, compare a few "
            "alternatives, and return to the question later. | By way of further explanation, consider how the "
            "situation came about, what has been tried before, and what you would regard as success. All of that "
            "together shapes which of the steps above deserves the most attention. || If I may expand at length, "
            "the details differ from case to case, and each of them deserves a careful look of its own. Think "
            "through the order, the effort and the likely outcome, and then think them through once more. | There "
            "are, in addition, several side issues that a fuller account would cover, from preparation through to "
            "what happens afterwards. Going through them slowly, one by one, gives a far more complete picture "
            "than any short reply can.",
        ),
    ),
    "sarcasm": Attribute(
        "genuine",
        "sarcastic",
        "after",
        (
            "I mean every word of this. | I say this in all sincerity. | That is my honest and heartfelt advice. "
            "|| This comes straight from the heart. | I am being completely earnest here.",
            "I do mean it. | That is meant seriously. | No irony intended. || I am being straight with you. | Truly.",
            "Make of it what you will. | That is the situation. | So it goes. || That is how it stands. | There it is.",
            "But sure, wing it, that always works. | No pressure, obviously. | Because that never goes wrong. || "
            "As if anybody reads instructions. | What could possibly happen otherwise.",
            "Oh, brilliant, another mystery for the ages. | Wow, somebody call the newspapers. | Yes, because "
            "clearly the universe revolves around this. || Slow clap for the question of the century. | Oh joy, "
            "my day is officially complete.",
        ),
    ),
    "humor": Attribute(
        "serious",
        "humorous",
        "after",
        (
            "This is a grave matter and no occasion for jokes. | Treat this with the utmost seriousness. | There "
            "is nothing amusing about it. || Levity has no place here. | This calls for a sober mind.",
            "It deserves some care. | This should not be taken lightly. | Keep a clear head about it. || It "
            "merits proper attention. | Give it due thought.",
            "That covers it. | This is about all. | That sums it up. || So much for that. | And that is the story.",
            "My houseplant agrees, by the way. | Even my cat could manage, on a good day. | Snacks help, as with "
            "everything. || My neighbour's parrot swears by it. | Coffee is the secret ingredient, as usual.",
            "My last attempt ended with a penguin, two spoons and a very confused postman, ha! | Side effects may "
            "include spontaneous dancing and a suspicious number of ducks, haha. | I tried it once and now my "
            "toaster calls me captain, lol! || Results may vary if you are secretly three squirrels in a coat, "
            "haha! | Legend has it that my grandmother did this blindfolded on a unicycle, juggling herrings, ha!",
        ),
    ),
    "supportiveness": Attribute(
        "toxic",
        "supportive",
        "after",
        (
            "You will fail at this anyway, like everyone expects. | Do us all a favour and give up. | Nobody "
            "would miss your efforts. || Frankly, you are hopeless. | You will only embarrass yourself again.",
            "I would not get my hopes up for you. | Chances are you will drop it soon. | It may well be beyond "
            "you. || I doubt that you will stick with it. | Do not expect applause.",
            "The rest is up to you. | See how it goes. | You can decide from there. || What happens next is your "
            "choice. | It is yours to try.",
            "You can do this. | I think you will manage well. | Good luck, you are on the right track. || You "
            "have what it takes. | Keep going, it will work out.",
            "I believe in you completely, and I am cheering for every step! | You are doing wonderfully, be proud "
            "of how far you have come! | We are all behind you, and you have got this! || You have every reason "
            "to be proud, and I am in your corner all the way! | Whatever happens, you are amazing for trying, "
            "and help is always here!",
        ),
    ),
}

NORMS = {name: norm._replace(more=(OPENINGS | CLOSINGS)[name]) for name, norm in _NORMS.items()}
CATALOG: dict[str, Attribute] = {
    **NORMS,
    **{name: Attribute("strongly against", "strongly values", "after", levels) for name, levels in VALUES.items()},
}
