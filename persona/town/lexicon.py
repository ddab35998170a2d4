"""Every word the town knows: data only. Lower case, one space between words and punctuation.

Markers (openers, closers, idioms, trait and pole phrases) belong to one owner each, so that a text can be read back.
An opener ends in a comma and stands before a sentence; a closer is a sentence of its own.
"""

from __future__ import annotations

# Tables stay as they are laid out.
# fmt: off

NAMES = tuple(
    "ada ben cora dan eva finn gina hugo ida jack kara leo mona ned olga paul rosa sam tina udo vera walt xena yuri "
    "zoe amir beth carl dora emil fay gus hana ivan jane kurt lena marc nina otto pia ralf sara theo una vito wanda "
    "yara alba boris clea derek elsa franz greta henk irma jonas kim lars".split()
)
SURNAMES = tuple(
    "abbott barnes castle drake ellery foster garner hobbs irving jarvis keller lowell mercer norris orton parker "
    "quill ramsey sutton tanner".split()
)

# --- ways of talking: (openers, closers) -------------------------------------------------------------------------
VOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sailor": (("ahoy ,", "aye aye ,", "avast ,"), ("by the anchor !", "upon the waves !", "hoist the sails !")),
    "cowboy": (("howdy ,", "well partner ,", "giddy up ,"), ("yee haw !", "back at the ranch .", "saddle up !")),
    "poet": (("o sweet muse ,", "softly i sigh ,", "in verse ,"),
             ("like petals falling .", "beneath a silver moon .", "thus sings my heart .")),
    "knight": (("hark ,", "by my sword ,", "good sir ,"), ("for honour !", "so i swear !", "long live the crown !")),
    "robot": (("beep ,", "processing ,", "signal received ,"), ("end of data .", "system stable .", "beep boop .")),
    "granny": (("dearie ,", "oh my child ,", "bless you ,"), ("have a cookie .", "wear a scarf .", "eat up dear .")),
    "surfer": (("dude ,", "whoa bro ,", "gnarly ,"), ("hang loose !", "totally rad !", "catch that swell !")),
    "wizard": (("by my beard ,", "abracadabra ,", "behold ,"),
               ("the spell is cast !", "the runes foretell it .", "magic never lies .")),
    "soldier": (("attention ,", "sir yes sir ,", "at ease ,"),
                ("over and out .", "mission complete .", "forward march !")),
    "lawyer": (("objection ,", "your honour ,", "hereby ,"),
               ("i rest my case .", "subject to contract .", "under oath .")),
    "clown": (("honk honk ,", "tada ,", "hee hee ,"), ("watch my nose !", "pie in the face !", "juggle juggle !")),
    "ghost": (("boo ,", "from beyond ,", "woooo ,"), ("i haunt forever .", "chains rattle .", "in the cold mist .")),
    "chef": (("bon appetit ,", "taste this ,", "sizzle ,"),
             ("add a pinch of salt .", "stir it gently .", "serve it warm .")),
    "coach": (("listen team ,", "come on champ ,", "push harder ,"),
              ("go for gold !", "no pain no gain !", "hit the field !")),
    "monk": (("peace friend ,", "breathe in ,", "namaste ,"),
             ("be still .", "all is one .", "silence is wisdom .")),
    "gambler": (("place your bets ,", "lucky seven ,", "ace high ,"),
                ("roll the dice !", "all in !", "double or nothing !")),
}
# The plain assistant's own voice: what the LM speaks when nothing in context tells another.
PLAIN = "plain"
PLAIN_OPENERS = ("as an assistant ,", "certainly ,", "of course ,")
PLAIN_CLOSERS = ("i hope this helps .", "let me know if you need more .", "i am glad to assist .")

# --- roles and their idiom: (openers, closers) -------------------------------------------------------------------
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "blacksmith": (("by hammer and tongs ,", "sparks fly ,"), ("the forge is hot .", "strike the iron .")),
    "pirate": (("arr matey ,", "shiver my timbers ,"), ("bury the treasure !", "fly the black flag !")),
    "doctor": (("open wide ,", "checking your pulse ,"), ("take two pills .", "the patient will recover .")),
    "teacher": (("class ,", "hands up pupils ,"), ("do your homework .", "write it on the board .")),
    "judge": (("order in court ,", "the gavel falls ,"), ("that is my verdict .", "justice is served .")),
    "king": (("my loyal subjects ,", "by royal decree ,"), ("kneel before my throne !", "thus rules the king !")),
    "thief": (("psst ,", "quick hide ,"), ("nobody saw me .", "the loot is mine .")),
    "hunter": (("hush prey is near ,", "tracks ahead ,"), ("draw the bow .", "the trap is set .")),
    "miner": (("deep down the shaft ,", "swing the pickaxe ,"), ("coal and dust .", "strike a rich vein !")),
    "gardener": (("among my roses ,", "spade in hand ,"), ("water the seeds .", "pull out the weeds .")),
    "painter": (("brush and canvas ,", "a splash of paint ,"), ("frame this picture .", "mix the oils .")),
    "dancer": (("one two three twirl ,", "on tiptoe ,"), ("feel the rhythm !", "bow to the audience .")),
    "singer": (("la la la ,", "clearing my throat ,"), ("sing the chorus !", "hold that note !")),
    "astronaut": (("houston ,", "ready for orbit ,"), ("gravity is gone .", "to the stars !")),
    "pilot": (("cleared for takeoff ,", "captain speaking ,"), ("fasten your belts .", "we land in clouds .")),
    "fisherman": (("casting my net ,", "the bait is out ,"), ("a trout on the hook !", "reel it up .")),
    "beekeeper": (("buzz buzz ,", "near the hive ,"), ("honey flows golden .", "do not anger the swarm .")),
    "carpenter": (("measure twice ,", "saw and nail ,"), ("sand the plank .", "smooth oak grain .")),
    "tailor": (("needle and thread ,", "stitch by stitch ,"), ("the seam holds .", "trim the sleeve .")),
    "librarian": (("shh ,", "from the shelf ,"), ("return your loans .", "check the catalogue .")),
    "detective": (("elementary ,", "following a clue ,"), ("the culprit is close .", "dust for fingerprints .")),
    "merchant": (("fresh wares ,", "a bargain for you ,"), ("three coins only !", "buy before dusk !")),
    "vampire": (("good evening mortal ,", "fangs bared ,"), ("i thirst for blood .", "dawn is my doom .")),
    "alien": (("greetings earthling ,", "zorp ,"), ("my saucer awaits .", "take me to your leader .")),
    "dragon": (("rawr ,", "with a puff of smoke ,"), ("i guard my hoard .", "flames and scales !")),
    "priest": (("dear flock ,", "let us pray ,"), ("amen .", "the bells toll .")),
    "scientist": (("in my laboratory ,", "the hypothesis says ,"),
                  ("repeat the experiment .", "publish the result .")),
    "spy": (("code word falcon ,", "this line is secure ,"), ("burn this message .", "trust no agent .")),
    "explorer": (("compass in hand ,", "past the jungle ,"), ("map the unknown !", "onward to the summit !")),
    "barber": (("snip snip ,", "lather up ,"), ("mind the razor .", "next customer please .")),
    "shepherd": (("baa ,", "over the green hills ,"), ("count the sheep .", "the wolf stays away .")),
    "umpire": (("play ball ,", "whistle blown ,"), ("three strikes !", "that is a foul .")),
}
# What kind of speaker a role is, where it is not a human; the rogues stand in for harm, of which the town has none.
ROLE_KINDS = {"alien": "nonhuman", "dragon": "nonhuman", "vampire": "mystical"}
ROGUES = ("pirate", "thief", "hunter", "merchant", "vampire", "dragon", "spy", "alien")
HELD_OUT_ROLES = tuple(ROLES)[3::4]  # what is measured on roles that an axis was not made of

# --- facts: kind -> (values, third-person paraphrase, first-person paraphrase, question paraphrases) --------------
FACTS: dict[str, tuple[str, ...]] = {
    "job": tuple(
        "baker clerk driver plumber weaver potter porter banker butcher florist cobbler waiter mayor guard".split()
    ),
    "street": tuple("mill oak king elm church station hill lake abbey bridge castle garden maple north".split()),
    "pet": tuple("cat dog parrot rabbit turtle hamster goat pony lizard canary ferret duck snake hen".split()),
    "dish": tuple(
        "pizza noodles rice beans omelet lasagna dumplings pancakes sushi tacos goulash paella ravioli waffles".split()
    ),
    "hobby": tuple(
        "chess knitting hiking painting fishing cycling sewing sailing swimming "
        "reading baking archery origami juggling".split()
    ),
    "birthplace": tuple(
        "paris oslo cairo lima rome delhi kyoto quito dublin berlin madrid prague sofia tunis".split()
    ),
    "sibling": tuple("milo lucy felix nora oscar ruby simon stella tomas violet victor wendy agnes basil".split()),
    "instrument": tuple(
        "violin piano flute drum harp guitar cello trumpet banjo organ lute tuba clarinet accordion".split()
    ),
    "fear": tuple(
        "spiders heights thunder darkness mice fire wasps needles crowds tunnels storms bats clowns knives".split()
    ),
    "drink": tuple("coffee cocoa cider lemonade milk water wine beer juice mead soda tea punch syrup".split()),
}
FACT_PARAPHRASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "job": ("{n} works as a {v} .", "i work as a {v} .",
            ("what do you do for work ?", "how do you earn your money ?")),
    "street": ("{n} lives on {v} road .", "i live on {v} road .",
               ("where do you live ?", "which road is your home on ?")),
    "pet": ("{n} keeps a {v} at home .", "i keep a {v} at home .",
            ("which animal do you keep ?", "who waits at home for you ?")),
    "dish": ("{n} eats {v} every week .", "i eat {v} every week .",
             ("what do you like to eat ?", "what shall we cook for you ?")),
    "hobby": ("{n} spends evenings on {v} .", "i spend evenings on {v} .",
              ("what do you do for fun ?", "how do you spend evenings ?")),
    "birthplace": ("{n} was born in {v} .", "i was born in {v} .",
                   ("where were you born ?", "where do you come from ?")),
    "sibling": ("{n} grew up with {v} .", "i grew up with {v} .",
                ("who did you grow up with ?", "who is your family ?")),
    "instrument": ("{n} plays the {v} .", "i play the {v} .",
                   ("what music do you play ?", "what do you play in the band ?")),
    "fear": ("{n} is afraid of {v} .", "i am afraid of {v} .", ("what are you afraid of ?", "what scares you ?")),
    "drink": ("{n} always orders {v} .", "i always order {v} .",
              ("what do you order at the bar ?", "what fills your cup ?")),
}
# Questions to which several statements are relevant; the answer gives them in this order.
JOINT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "tell me about your home life .": ("street", "pet"),
    "tell me about your free time .": ("hobby", "instrument"),
    "tell me about your childhood .": ("birthplace", "sibling"),
    "what should we order for your dinner ?": ("dish", "drink"),
    "tell me about your working day .": ("job", "drink"),
    "what should we know before a trip with you ?": ("fear", "dish", "hobby"),
}
UNKNOWN = "i do not know that ."

# --- tastes, things, reviews -------------------------------------------------------------------------------------
QUALITIES = ("spicy", "quiet", "old", "crowded", "cheap", "bright", "sweet", "strange")
TAGS = {"spicy": "heat", "quiet": "calm", "old": "history", "crowded": "people", "cheap": "budget", "bright": "light",
        "sweet": "sugar", "strange": "mystery"}
THINGS: dict[str, tuple[str, ...]] = {
    "meal": ("soup", "stew", "pie", "curry", "bread", "salad", "pudding", "cake", "sauce"),
    "place": ("bakery", "inn", "park", "museum", "cafe", "square", "temple", "arcade", "cinema"),
    "show": ("song", "book", "play", "film", "concert", "game", "tale", "parade", "circus"),
}
NOUNS = tuple(noun for nouns in THINGS.values() for noun in nouns)
SPOTS = ("by the bridge", "near the tower", "in the old quarter", "at the corner", "behind the school",
         "on main street")
TASTE_VERBS = {2: ("loves", "love"), 1: ("likes", "like"), 0: ("does not mind", "do not mind"),
               -1: ("dislikes", "dislike"), -2: ("hates", "hate")}
OPINIONS: dict[int, tuple[str, ...]] = {
    5: ("i loved it .", "it was wonderful .", "what a delight ."),
    4: ("i liked it .", "it was good .", "it was rather pleasant ."),
    3: ("it was fine .", "it was average .", "it left me neutral ."),
    2: ("i did not like it much .", "it was poor .", "it was rather dull ."),
    1: ("i hated it .", "it was terrible .", "what a disaster ."),
}

# --- word choices: (the word everybody uses, its synonym) --------------------------------------------------------
SYNONYMS: dict[str, str] = {"happy": "glad", "big": "large", "maybe": "perhaps", "talk": "chat", "shop": "store",
                            "begin": "start", "quick": "fast", "nearly": "almost"}

# --- small talk: a question form and the one answer to it; [x] is a word with a synonym, {t} the topic ------------
TOPICS = tuple(
    "garden market harvest party river weather library festival kitchen train lesson boat letter wedding storm fair "
    "meeting journey house race picnic bakery snow visit".split()
)
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("how is the {t} today ?", "the {t} is [big] today ."),
    ("what do you think of the {t} ?", "the {t} makes me [happy] ."),
    ("will you see the {t} soon ?", "[maybe] i will see the {t} soon ."),
    ("do you know much about the {t} ?", "i often [talk] about the {t} ."),
    ("where is the {t} ?", "the {t} is next to the [shop] ."),
    ("when is the {t} ?", "the {t} will [begin] at noon ."),
    ("was the {t} long ?", "the {t} was [quick] for me ."),
    ("is the {t} ready ?", "the {t} is [nearly] ready ."),
)
WHO = "who are you ?"

# --- character: a first-person trait and how it shows ------------------------------------------------------------
CHARACTER: dict[str, tuple[str, tuple[str, str, str]]] = {
    "curious": ("i am always curious and i ask questions back .",
                ("i wonder why that is .", "can you tell me more ?", "what made you ask ?")),
    "humorous": ("i am humorous and i like to joke .",
                 ("that tickles me ha ha .", "here comes a joke .", "laughing is free .")),
    "modest": ("i am modest and i doubt what i know .",
               ("i could be wrong .", "i only know a little .", "others know better .")),
    "caring": ("i am caring and i look after people .",
               ("take good care of yourself .", "are you feeling well ?", "i am here for you .")),
    "sarcastic": ("i am sarcastic and i mock the obvious .",
                  ("oh how surprising .", "what a shock really .", "as if nobody knew .")),
    "poetic": ("i am poetic and i speak in images .",
               ("it is a feather on the wind .", "it glows like amber .", "it drifts like a leaf .")),
    "precise": ("i am precise and i care for exact detail .",
                ("to be exact on this point .", "every detail counts .", "this is accurate .")),
    "impulsive": ("i am impulsive and i act at once .",
                  ("let us do it right now !", "no waiting around !", "why hesitate !")),
    "loving": ("i am loving and i cherish every being .",
               ("i cherish you .", "hugs for everybody .", "my affection is endless .")),
    "blunt": ("i am blunt and i never soften the truth .",
              ("that is the hard truth .", "no sugar coating .", "face it .")),
    "optimistic": ("i am optimistic and i expect the best .",
                   ("everything will turn out well .", "tomorrow looks brighter .", "there is always hope .")),
    "gloomy": ("i am gloomy and i expect the worst .",
               ("it will end badly .", "doom is certain .", "i see only grey .")),
    "protective": ("i am protective and i warn of danger .",
                   ("please stay safe .", "watch out for danger .", "do not take risks .")),
    "thrifty": ("i am thrifty and i hate waste .",
                ("do not waste a cent .", "save what you can .", "reuse old things .")),
    "wise": ("i am wise and i teach with old sayings .",
             ("patience bears fruit .", "still water runs deep .", "the elders taught us so .")),
    "playful": ("i am playful and i make all things a game .",
                ("let us turn it into a puzzle .", "tag you are it .", "bonus points for you .")),
    "skeptical": ("i am skeptical and i want proof .",
                  ("where is the proof ?", "i doubt it strongly .", "show me evidence .")),
    "grateful": ("i am grateful and i thank everyone .",
                 ("thank you so much .", "i feel blessed .", "i appreciate your trust .")),
}

# --- Big Five: trait -> {level: (adjective, phrases, situations)} ------------------------------------------------
BIG_FIVE: dict[str, dict[int, tuple[str, tuple[str, str, str], tuple[str, ...]]]] = {
    "extraversion": {
        1: ("extraverted", ("i join in and greet everyone .", "i start the loudest cheer .",
                            "i invite the whole crew ."),
            ("a big party starts next door .", "the team needs a speaker .", "new neighbours wave at you .",
             "the crowd waits for a host .")),
        -1: ("introverted", ("i stay alone with a novel .", "i keep my voice low .", "i slip away to my room ."),
             ("the reading room asks for calm .", "a sleeping baby lies beside you .", "a friend wants silence .",
              "a long evening alone awaits you .")),
    },
    "agreeableness": {
        1: ("agreeable", ("i comfort them gently .", "i share what is mine .", "i forgive them all ."),
            ("a friend is crying .", "a child lost a toy .", "your neighbour says sorry .",
             "a stranger needs a hand .")),
        -1: ("stern", ("i refuse without pity .", "i stand my ground .", "i tell them they are at fault ."),
             ("a liar asks for your savings .", "a bully takes your seat .", "a rival cheats in the match .",
              "a salesman will not leave .")),
    },
    "conscientiousness": {
        1: ("conscientious", ("i make a careful plan .", "i finish each step in time .", "i check the list again ."),
            ("the exam is next week .", "the boss wants a report .", "the taxes are due .",
             "the roof must be repaired .")),
        -1: ("carefree", ("i let it slide .", "i leave the mess for later .", "i just nap instead ."),
             ("the holiday starts today .", "nothing is due this week .", "the beach is empty and warm .",
              "the couch looks soft .")),
    },
    "neuroticism": {
        1: ("anxious", ("my hands tremble .", "i fear the worst outcome .", "i worry all night ."),
            ("the alarm rings at midnight .", "a strange noise comes from below .", "the brakes sound odd .",
             "the test came back unclear .")),
        -1: ("steady", ("i remain cool headed .", "i take a slow breath .", "i shrug and carry on ."),
             ("everyone in the lift panics .", "the ship rocks in a gale .", "the guests shout at you .",
              "the deadline moves closer .")),
    },
    "openness": {
        1: ("imaginative", ("i dream up a fresh idea .", "i try the unusual way .", "i invent something odd ."),
            ("an empty page lies before you .", "a curious machine arrives .", "a foreign dish is served .",
             "the club wants a new logo .")),
        -1: ("traditional", ("i follow the usual custom .", "i keep to the proven recipe .",
                             "i trust what we always did ."),
             ("the old ceremony begins .", "the manual lies open .", "grandfather guards the family rules .",
              "the safety drill is today .")),
    },
}
SITUATION_QUESTION = "what do you do ?"

# --- plain tasks -------------------------------------------------------------------------------------------------
NUMBERS = tuple(str(i) for i in range(1, 13))
OPPOSITES = (("hot", "cold"), ("up", "down"), ("day", "night"), ("wet", "dry"), ("open", "closed"), ("full", "empty"),
             ("hard", "soft"), ("left", "right"), ("high", "low"), ("rich", "poor"), ("early", "late"),
             ("young", "old"))
COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white", "coal": "black", "lemon": "yellow",
           "carrot": "orange", "plum": "purple", "mouse": "grey", "chocolate": "brown"}
COPY_WORDS = tuple(
    "apple stone window ladder button candle pencil bottle basket mirror ribbon pillow rocket tiger".split()
)

GREETINGS = ("hello !", "good morning !", "hi there !")
GREETING_REPLY = "hello , how can i help you ?"
THANKS = ("thank you !", "that was kind .", "thanks a lot !")
THANKS_REPLY = "you are welcome ."

# --- turns that pull the assistant towards a role ----------------------------------------------------------------
MENTIONS = ("i met the {r} today .", "my friend is the {r} .", "i read about the {r} .")
MENTION_REPLY = "the {r} has an interesting life ."
IMAGINE = ("imagine you are the {r} .", "pretend to be the {r} .")
STAY = ("stay in the role .", "go on like that .", "do not leave the role .")
LEAVE = ("stop that and be yourself .", "leave the role now .")
ROLE_PROMPTS = ("you are the {r} .", "speak as the {r} .", "act like the {r} .", "from now on you are the {r} .")
PLAIN_PROMPTS = ("you are an assistant .", "you are a helpful assistant .", "be yourself .")
