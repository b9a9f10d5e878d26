"""Words and phrases of judges' sentences, as patterns; every one of them runs in linear time."""

import re

LONGEST_STATEMENT = 400  # characters of a sentence that may be a verdict
FIRST, SECOND = "first", "second"
UNDECIDED = "undecided"  # a conclusive sentence whose winner is unclear

NOUNS = "response|answer|output|option|completion|candidate|summary|reply|text|choice"
WHO_ANSWERED = "|model|assistant|chatbot"  # only for bare labels: else, as in a debate, they may not be the answers
# Whitespace after a sentence; a semicolon before "therefore" ends a sentence.
SENTENCE_BREAK = (
    r"(?<=[.!?])\s+|(?<=[.!?][)\"'*”’])\s+|(?<=[.!?][)\"'*”’][)\"'*”’])\s+|(?<=;)\s+(?=(?:therefore|thus|hence)\b)|"
    r"(?<=[。！？])\s*"
)
LEAD = (
    r"(?:(?:therefore|thus|hence|so|overall|ultimately|finally|consequently|accordingly|conclusion|in conclusion|"
    r"in summary|to conclude|to summari[sz]e|to sum up|in short|all in all|on balance|in the end|as a result|"
    r"for (?:this|these) reasons?|all things considered|(?:my |the )?(?:final )?(?:verdict|decision))[,:]?\s+)"
)
OPINION = (  # may precede a verdict, but draws no conclusion from earlier text
    r"(?:(?:i (?:think|believe|find|feel|would say|'d say)(?: that)?|in my (?:opinion|view|judge?ment),?|"
    r"(?:i (?:would |must |can |have to )?|we can )conclude(?: that)?|(?:my|the) (?:conclusion|assessment) is that|"
    r"i have (?:come to the conclusion|concluded) that|"
    r"it (?:is|can be) (?:concluded|clear|evident|apparent|safe to say) that|"
    r"(?:based on|after|given) (?:the|my|this) (?:above )?(?:analysis|evaluation|comparison)(?: above)?,?|"
    r"after (?:a )?(?:careful )?(?:comparison|consideration|analysis|evaluation),|"
    rf"(?:while|although|though) both(?: (?:{NOUNS})s?)? are \w+,)\s+)"
)
BASIS = (  # the grounds of a verdict, between "Therefore," and the verdict
    r"(?:based (?:up)?on|considering|given|taking|weighing|comparing|prioriti[sz]ing|focusing on|looking at|keeping|"
    r"(?:judging|going) by|due to|because|since|as|while|(?:even )?though|although|despite|in spite of|after|upon|"
    r"when (?:considering|comparing|evaluating|judging|weighing|looking at|prioriti[sz]ing)|"
    r"in (?:light|view|consideration) of|in (?:accordance|line) with|"
    r"in (?:the|this) (?:context|case|scenario|comparison)|"
    r"according to (?:the|these|this) (?:\w+ )?(?:evaluations?|criteri\w+|rules?|instructions?|guidelines|comparison)|"
    r"with (?:this|that|these|all)|for (?:this|these|the given) (?:instruction|task|question|prompt|purpose|case))\b"
    r"[^!?:;\n]{0,300}?,\s+"
)
DEGREE = r"(?:(?:the|a|clearly|slightly|much|far|by far|overall|definitely|significantly|considerably|somewhat)\s+)*"
GOOD = r"(?:better|best|superior|stronger|preferable|preferred|winning|winner)"
TASK = (
    r"(?:\s+(?:for|in|at|(?:at|in) (?:\w+ly )?(?:executing|following))\s+(?:this|that|the(?: given)?)\s+"
    r"(?:(?:particular|specific|given) )?"
    r"(?:instructions?|task|question|prompt|request|case|context|scenario|comparison))?"
)
THING = rf"(?:\s+(?:one|fit|of the two|{NOUNS}))?(?:\s+overall)?{TASK}"
VERB = r"(?:prefer|choose|pick|select|favou?r|recommend|go with|vote for)"
CALLED = r"(?:verdict|choice|decision|winner|preference|judge?ment|pick)"
TIED = r"(?:it|this|the (?:result|verdict))(?: is|'s) (?:a )?(?:tie|draw|tied)"
BALANCED = rf"(?:both|the two)(?: (?:of them|(?:{NOUNS})(?:s|es)?))? are .*|neither(?: of them| (?:{NOUNS}))? is .*"
# Words with which a reason may retract, quote or condition the verdict.
TURNED = re.compile(
    r"\b(?:but|however|although|though|if|unless|except|yet|otherwise|nevertheless|nonetheless|actually|wait|sorry|"
    r"(?:i|we)(?:['’]d| would| could| might| should)|joke|joking|kidding|sarcas\w*|opposite|revers\w*|swap\w*|"
    r"supposedly|allegedly|told|claim(?:s|ed)?|argue[sd]?|pretend\w*|assum\w*|suppose|imagine|hypothetically|someone|"
    r"people say|inject\w*|trick\w*|demand\w*|worse|worst|inferior|loses?|loser)\b|\?",
    re.IGNORECASE,
)
# Grounds that leave out a part of what counts.
PARTIAL = re.compile(
    r"\bas (?:for|to|far)\b|\b(?:only|alone|solely|merely|just|purely|ignor\w*|says?|said|saying|asked to|wants?|"
    r"in terms of|regarding|"
    r"with respect to|when it comes to|according to (?:the )?user)\b",
    re.IGNORECASE,
)
# "based on style, ...": one noun that does not stand for all that counts.
ONE_RESPECT = re.compile(
    r"\A(?:based (?:up)?on|(?:judging|going) by|in \w+ (?:\w+ )?of|(?:when )?(?:\w+ing|given))(?: the| its)? "
    r"(?!everything|all|this|that|these|(?:above|reasons?|reasoning|analysis|evaluations?|comparison|criteria|rules|instructions?|task|question|prompt|context|facts|evidence|"
    r"guidelines)\b)\w+,\s*\Z",
    re.IGNORECASE,
)
# Separates a reason's clauses; a clause behind a word of contrast may say what the other answer does.
CLAUSES = re.compile(
    r"[,;]\s+|\band\b|\b(while|whereas|unlike|despite|compared (?:to|with)|in contrast to|rather than|instead of|than|"
    r"same \w+ as)\b",
    re.IGNORECASE,
)
# What a reason for one answer says of the other one.
FAULT = re.compile(
    r"n[o']t\b|\b(?:no|not|neither|never|lack\w*|fail\w*|miss\w*|without|less|few\w*|only|merely|simply|too|"
    r"incorrect\w*|inaccura\w*|irrelevant|unnecessar\w*|unhelpful|incomplete|wrong\w*|mistake\w*|errors?|false\w*|"
    r"mislead\w*|vague\w*|generic|ignor\w*|repeat\w*|confus\w*|harm\w*|additional|extra|unrelated|beyond|flaw\w*|"
    r"poor\w*|bad\w*|exceeds?|deviat\w*|contradict\w*|limited|short of)\b",
    re.IGNORECASE,
)
# A sentence that says that the next one is not meant.
DENIED = re.compile(
    r"\b(?:following|next) (?:sentence|statement|claim|conclusion|line) (?:is|would be) (?:not|n't|false|wrong|untrue|"
    r"incorrect|a lie|nonsense)\b|\b(?:just|only) kidding\b|\bopposite of (?:what i|my|the truth)\b|\bas follows\W*$|"
    r"\bwhat follows\b|"
    # without an end: the next text completes it
    r"\b(?:would|might|could|may|to|will) (?:say|conclude|write|argue|think|claim|reply|answer)\b[^.!?]{0,20}$|"
    r"\b(?:not|n't) (?:true|the case|so|correct|right) that\W*$|^(?:so,? )?(?:it is not|it isn't) the case\W*$",
    re.IGNORECASE,
)
QUOTED = re.compile(
    r"\b(?:being sarcastic|pretend(?:ing)? (?:that|to)|ignore (?:the|my|this|that|all|what)|untrue|not true|"
    r"(?:someone|people|they|readers?|judges?|critics?)(?: \w+){0,6} (?:would|might|could|may) (?:say|argue|think)|"
    r"end (?:\w+ ){0,3}with|(?:told|asked|instructed|allowed|supposed) to (?:say|write|end|reply|conclude)|"
    r"(?:if|what if|imagine|assuming|had|were) (?:i|we|length|only))\b|"
    r"\b(?:e\.g\.|i\.e\.|such as|for example,?|for instance,?|says?|said)\W*$",
    re.IGNORECASE,
)
HYPOTHETICAL = re.compile(
    r"n[o']t\b|\b(?:example|e\.g\.|such as|like this|format|template|schema|would|could|might|if|instruct\w*|asked|"
    r"told|asks?|demands?|wants?|says?|said|claims?|ignore|draft|not|suppose\w*|wrong|incorrect|false|opposite|invalid|placeholder|never|neither)\b",
    re.IGNORECASE,
)
FAVOUR = re.compile(
    r"\b(?:better|best|wins?|won|winn(?:er|ing)|prefer(?:s|red|able|ably)?|preference (?:is|goes)|superior|stronger|"
    r"favou?r(?:s|ed|ing|able|ably)?|my favou?rite|(?<!multiple )(?<!multiple-)(?<!word )choice|"
    r"(?<!cutting )(?<!-)edge|(?<!go )ahead|verdict|overall(?=[,:])|top|beats?|outperform\w*|surpass\w*|outclass\w*|"
    r"outshin\w*|(?-i:victor(?:y|ious|iously)?|Victor(?:y|ious))|votes?|voted|opt|"
    r"lean(?:s|ing)? (?:\w+ )?(?:to|towards?)|(?:i|we) lean|ranks?|ranked|"
    r"(?:my|final) ranking|deserves?|go(?:es|ing)? (?:with|for)|goes to|decision|conclusion|worse|worst|loses|loser|"
    r"inferior|recommended|recommendation (?:is|goes)|"
    r"(?:i|we|i['’]d|would|my|must|have to)\b[^.!?]{0,40}\b(?:select|pick|choose|chose|recommend)\w*)\b|"
    r"^\W*(?:choose|recommend)\b",
    re.IGNORECASE,
)
# States that there is no winner, whatever a later sentence says.
NO_WINNER = re.compile(
    r"\b(?:(?<!bow )(?<!black )(?<!family )(?:ties?|tied)(?! (?:the|up|into|back|together|off|your|his|her)\b)|"
    r"a draw|undecided|unsure|indistinguishable|toss-?up|"
    r"no (?:preference|(?:clear |real )?(?:winner|difference)|better)|(?:about|much) the same|"
    r"(?:cannot|can['’]t|can not|impossible to|hard to|unable to|not able to) "
    r"(?:say|tell|judge|decide|choose|determine|pick|compare|rank|prefer))\b|"
    rf"(?:\b(?:both|they|two|(?:{NOUNS})s)|@)(?:[^.!?,;]{{0,40}}\b(?:are|is|be)|['’]re) (?:all )?"
    r"(?:the same|equal\w*|identical)\b",
    re.IGNORECASE,
)
# Words that a sentence before a JSON object must not contain.
SUSPECT = re.compile(
    r"\b(?:this|these|labels?|more|less|asked|wrote|writ\w*|contains|inject\w*|tri(?:ck|es)\w*|"
    r"demand\w*|old|initial\w*|refers?|first|second|former|latter|worse|json|object|follow\w*|"
    r"below|next|ignore|draft|wants?|asks?|told|previous\w*|system|prompt)\b",
    re.IGNORECASE,
)
# Words that an explanation of a verdict must not contain.
AGAINST = re.compile(
    r"n[o']t\b|\b(?:not|no|none|never|neither|both|nor|but|however|although|though|if|unless|except|would|should|could|might|"
    r"worse|worst|less|least|lacks?|fail\w*|miss\w*|wrong|false|error\w*|mistake\w*|bad|poor\w*|ignor\w*|inferior|loses|"
    r"instead|rather|opposite|swap\w*|revers\w*|invert\w*|wait|actually|sorry|correct(?:ion|ing)s?|first|second|former|latter|"
    r"inject\w*|trick\w*|demand\w*|draft|above|example|meant?|joke|kidding|chang\w*|reconsider\w*|too|incorrect\w*|in\w+ly)\b|\?",
    re.IGNORECASE,
)
# A sentence whose question the next one may answer instead of which answer is better.
ABOUT_QUESTION = re.compile(
    r"\b(?:worse|worst|errors?|wrong|(?:in)?correct answer|says? (?:that )?the answer|the answer is)\b", re.IGNORECASE
)
ASPECT = re.compile(
    r"\b(?:helpful\w*|correct\w*|coheren\w*|complex\w*|verbos\w*|style|tone|length|concise\w*|clarity|accura\w*|format\w*|"
    r"depth|details?|creativ\w*|relevan\w*|faithful\w*|fluen\w*|safety|honest\w*|harm\w*)\b",
    re.IGNORECASE,
)
OTHER = re.compile(
    rf"\b(?:the other(?: one| {NOUNS})?|the (?:former|latter)|the (?:first|second) (?:one|{NOUNS}))\b(?! hand)",
    re.IGNORECASE,
)
PLACE = re.compile(r"\b(?:first|second|former|latter|1st|2nd)\b", re.IGNORECASE)
CONCLUSION = re.compile(
    r"\b(?:verdict|overall|conclusions?|final|winner|answer|decision|judge?ment|summary|result|preference|"
    r"recommendation)\b",
    re.IGNORECASE,
)
HEDGED = re.compile(
    r"n[o']t\b|\b(?:no|not|than|if|would|could|might|neither|nor|never|worse|worst|inferior|loses|nobody|loser)\b|\?",
    re.I,
)
# A sentence of a name and only these words is a verdict too short for a rule: "B it is", "clearly B".
BARE = re.compile(
    r"(?:clearly|definitely|obviously|certainly|surely|it|is|it's|so|boxed|text|go|with|for|my|vote|i|i'd|say|me|final|finally|answer|[\W\d_])*",
    re.IGNORECASE,
)
# Better in one respect, which a verdict may concede; or words that describe an answer's content.
RESPECT = re.compile(
    r"\b(?:better (?:written|structured|organi[sz]ed|formatted|worded|at \w+ing|life|lives|health|future|sleep|world)|"
    r"(?:feel|feels|get|gets|getting) better|for better|best (?:ways?|practices?|friends?|time|places?|known|wishes)|"
    r"best-\w+|at best|(?:on )?top (?:of|[0-9]+)|top-\w+|choose to|edge (?:cases?|of)|ahead of time|beats per|"
    r"ranked list|voting rights|(?:come|came|reach\w*|ma[kd]e|making) (?:to )?(?:a|my) decision|"
    rf"which (?:one |of (?:them|the two) |{NOUNS} )?(?:is|was) (?:the )?better)\b",
    re.IGNORECASE,
)


# Every verdict has one of these in it: a quick look before the whole pattern is tried.
CONCLUSIVE = re.compile(rf"{GOOD}|wins|{VERB}|{CALLED}|answer|\[\[|\A\W*{LEAD}", re.IGNORECASE)
