"""The simulation's inner loop, compiled: decoding on a machine whose GPU holds only some of the experts.

`prefetch.reference` says the same in plain Python, slowly; tests hold the two equal. In one decode step every sequence
of the batch moves by a token; in each layer

    attention      the link, the disk and the predictor work on beside it
    the router     names the experts needed (K of each sequence, united); prefetches still queued for this layer are
                   cancelled; absent experts are demanded; the predictor is asked about the layer `horizon` above
    waiting        until all needed experts are there: a fused kernel runs them at once
    experts        again with link, disk and predictor at work; needed experts can not be evicted until they are done

The link carries one expert at a time and finishes what it began; demands go first, then prefetches, nearest layer
first, likeliest expert first. A slot is freed when a transfer begins. A prefetch is held back as long as its victim is
needed no later and at least as likely. The disk, where RAM does not hold all experts, is a second such channel before
it. The predictor works on one request at a time and keeps only the newest that waits.

Time is whole nanoseconds and counters are whole numbers, so that sums are exact. Visit n * L + l is layer l of decode
step n; expert e of layer l is x = l * E + e. Everything compiled stays in this one file: numba's cache notices changes
of the file of a cached function only. State is a few plain arrays that are handed on, because tuples of arrays cost a
count of references at every access: a hundred times the work itself.

Shapes: N decode steps, R rows (one token of one sequence in one step), T tokens, L layers, E experts, K per token,
B guesses per token and layer, X = L * E, A sequences at once, G groups of layers that share slots, C slots, Q places in
the queue of prefetches.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

LRU, LFU, LFU_AGED, STATIC, GUIDED, BELADY = range(6)  # policies
AWAY, HERE, COMING = range(3)  # from the GPU, or from RAM
NEVER = np.int64(2**62)
FREE, BLOCKED = -1e300, 1e300  # keys of slots: holds nothing, and holds what can not be evicted

# Counters, in the order of the totals.
COUNTERS = (
    "tokens", "attention_ns", "experts_ns", "other_ns", "waiting_ns", "link_ns", "disk_ns", "lookups", "hits", "late",
    "demanded", "prefetched", "useful", "wasted", "cancelled", "held_back", "evicted", "disk_reads", "predicted",
    "skipped",
)  # fmt: skip
(
    TOKENS, ATTENTION_NS, EXPERTS_NS, OTHER_NS, WAITING_NS, LINK_NS, DISK_NS, LOOKUPS, HITS, LATE,
    DEMANDED, PREFETCHED, USEFUL, WASTED, CANCELLED, HELD_BACK, EVICTED, DISK_READS, PREDICTED,
    SKIPPED,
) = range(len(COUNTERS))  # fmt: skip

# Settings, whole numbers of a Machine. Times in ns: of an expert over the link, off the disk, of one prediction.
LAYERS, EXPERTS, POLICY, HORIZON, BUDGET, HALF_LIFE, TRANSFER, READ, PREDICT, RAM_SLOTS = range(10)

# Registers: the state's single numbers. *_X hold an expert or -1, ASKED and WANTED a visit or -1.
(
    CLOCK, KNOWN, OUTSTANDING, DEMANDS, HEAD, TAIL, LINK_X, LINK_END, DISK_X, DISK_END, ASKED, ASKED_END, WANTED,
) = range(13)  # fmt: skip

# Fields of an expert, rows of `experts_FX`: where it is (PLACE, RAM), brought by a prefetch and not needed since,
# needed now, visit of the last use, visit of the next, never evicted, its slot, visit of the last transfer from RAM;
PLACE, RAM, UNUSED, PINNED, STAMP, NEXT, PROTECTED, SLOT, RAM_STAMP, LAYER = range(10)
# and rows of `chances_FX`: decayed number of uses, probability at the visit that its layer expects.
COUNT, P = range(2)
# Fields of a queued prefetch, rows of `queue_FQ`: expert or -1, visit it is for, whether the disk has read it, whether
# it was held back.
QUEUE_X, QUEUE_VISIT, QUEUE_READ, QUEUE_HELD = range(4)


class Machine(NamedTuple):
    """What does not change during a run; times in ns, by A sequences at once and, for experts, how many are needed."""

    layers: int
    experts: int
    policy: int
    horizon: int  # 0: nothing is predicted
    budget: int  # guesses of each sequence that are prefetched
    half_life: int  # decode steps after which LFU_AGED and GUIDED halve their counts
    transfer_ns: int
    read_ns: int
    predict_ns: int  # of one sequence's prediction
    ram_slots: int  # 0: RAM holds all experts
    threshold: float  # least probability of what is prefetched
    attention_ns_A: NDArray[np.int64]
    experts_ns_AE: NDArray[np.int64]
    other_ns_A: NDArray[np.int64]
    group_L: NDArray[np.int64]
    first_slot_G: NDArray[np.int64]  # G + 1


class Work(NamedTuple):
    """What is decoded: rows `first_row_N[n]` to `first_row_N[n + 1]` are decode step n's."""

    first_row_N: NDArray[np.int64]  # N + 1
    token_R: NDArray[np.int64]
    sequence_R: NDArray[np.int64]
    begins_R: NDArray[np.bool_]  # the first token of its sequence, which nothing before it predicts
    expert_ids_TLK: NDArray[np.uint16]
    next_visit_RLK: NDArray[np.int32]  # when this expert is needed next; of size 0 unless the policy is BELADY
    first_visit_X: NDArray[np.int64]
    guess_ids_TLB: NDArray[np.uint16]
    guess_p_TLB: NDArray[np.float32]  # falling along B; below 0 where the list ends


class Start(NamedTuple):
    """What is there before the first token; slots and RAM hold the likeliest first, -1 where free."""

    slots_C: NDArray[np.int64]
    ram_slots: NDArray[np.int64]
    rate_X: NDArray[np.float64]  # how often a decode step needs this expert
    protected_X: NDArray[np.bool_]  # never evicted


def run(machine: Machine, work: Work, start: Start, sequences: int) -> tuple[Any, Any, int]:
    """Decode everything; return totals (C,), their shares by sequence (S, C), and prefetches never used at the end."""
    settings = np.array(machine[:10], dtype=np.int64)
    return _run(settings, *machine[10:], *work, *start, sequences)  # type: ignore[no-any-return]


@njit(cache=True)
def _run(
    settings, threshold, attention_ns_A, experts_ns_AE, other_ns_A, group_L, first_slot_G,
    first_row_N, token_R, sequence_R, begins_R, expert_ids_TLK, next_visit_RLK, first_visit_X,
    guess_ids_TLB, guess_p_TLB, first_slots_C, first_ram_slots, rate_X, protected_X, sequences,
):  # fmt: skip
    layers, experts = settings[LAYERS], settings[EXPERTS]
    registers = np.zeros(13, np.int64)
    registers[KNOWN] = -1
    registers[LINK_X] = registers[DISK_X] = registers[ASKED] = registers[WANTED] = -1
    totals = np.zeros(len(COUNTERS), np.int64)
    experts_FX = np.zeros((10, layers * experts), np.int64)
    experts_FX[LAYER] = np.arange(layers * experts) // experts
    experts_FX[STAMP] = experts_FX[RAM_STAMP] = -NEVER
    experts_FX[NEXT], experts_FX[PROTECTED] = first_visit_X, protected_X
    chances_FX = np.zeros((2, layers * experts))
    chances_FX[COUNT] = rate_X * settings[HALF_LIFE]
    steps = np.full(1, float(settings[HALF_LIFE]))  # decode steps that the counts are of
    expected_L = np.full(layers, np.int64(-1))  # the visit that a layer's probabilities are for
    slots_C, key_C = first_slots_C.copy(), np.full(len(first_slots_C), FREE)
    for slot, x in enumerate(slots_C):
        if x >= 0:
            experts_FX[PLACE, x], experts_FX[SLOT, x], experts_FX[STAMP, x] = HERE, slot, -1 - slot
            _set_key(x, settings, experts_FX, chances_FX, key_C)
    ram_slots = first_ram_slots.copy()
    for slot, x in enumerate(ram_slots):
        if x >= 0:
            experts_FX[RAM, x], experts_FX[RAM_STAMP, x] = HERE, -1 - slot
    demand = np.empty(experts, np.int64)
    places = 2 * experts * (settings[HORIZON] + 2)
    queue_FQ, queue_p_Q = np.empty((4, places), np.int64), np.empty(places)
    need = np.empty(experts, np.int64)
    shares_SC = np.zeros((sequences, len(totals)))
    before = totals.copy()
    for n in range(len(first_row_N) - 1):
        first, last = first_row_N[n], first_row_N[n + 1]
        active = last - first
        for phase in range(1 + 2 * layers):
            layer = (phase - 1) // 2
            if phase == 0:
                spent, counter = other_ns_A[active], OTHER_NS
            elif phase % 2:
                spent, counter = attention_ns_A[active], ATTENTION_NS
            else:
                needed = _route(
                    n, layer, need, settings, registers, totals, experts_FX, chances_FX, key_C, demand, queue_FQ,
                    first_row_N, token_R, expert_ids_TLK, next_visit_RLK,
                )  # fmt: skip
                spent, counter = experts_ns_AE[active, needed], EXPERTS_NS
            began = registers[CLOCK]
            while True:  # first until all that is needed is there, then for the time `spent`
                if registers[OUTSTANDING] == 0 and registers[CLOCK] - began >= spent:
                    break
                if registers[WANTED] >= 0 and registers[ASKED] < 0:
                    _ask(settings, registers, first_row_N)
                if settings[RAM_SLOTS] and registers[DISK_X] < 0:
                    _start_disk(settings, registers, totals, experts_FX, ram_slots, demand, queue_FQ)
                if registers[LINK_X] < 0 and (registers[DEMANDS] or registers[HEAD] < registers[TAIL]):
                    _start_link(
                        settings, registers, totals, experts_FX, chances_FX, steps, expected_L, slots_C, key_C, demand,
                        queue_FQ, queue_p_Q, group_L, first_slot_G,
                    )  # fmt: skip
                end = _next_end(registers)
                waited_for = registers[OUTSTANDING] > 0
                if not waited_for and end > began + spent:
                    registers[CLOCK] = began + spent
                    break
                registers[CLOCK] = end
                if registers[ASKED] >= 0 and registers[ASKED_END] == end and _answered(registers, totals):
                    _expect(
                        settings, registers, chances_FX, expected_L, queue_FQ, queue_p_Q, threshold, first_row_N,
                        token_R, begins_R, guess_ids_TLB, guess_p_TLB,
                    )  # fmt: skip
                _complete(settings, registers, experts_FX, chances_FX, key_C)
                if waited_for and registers[OUTSTANDING] == 0:
                    totals[WAITING_NS] += end - began
                    began = end
                    registers[DEMANDS] = 0
            totals[counter] += spent
            if counter == EXPERTS_NS:
                for i in range(needed):
                    experts_FX[PINNED, need[i]] = 0
                    _set_key(need[i], settings, experts_FX, chances_FX, key_C)
        steps[0] += 1.0
        if settings[POLICY] in (LFU_AGED, GUIDED) and (n + 1) % settings[HALF_LIFE] == 0:
            steps[0] *= 0.5
            for x in range(layers * experts):
                chances_FX[COUNT, x] *= 0.5
                if experts_FX[PLACE, x] == HERE:
                    _set_key(x, settings, experts_FX, chances_FX, key_C)
        totals[TOKENS] += active
        for row in range(first, last):
            for c in range(len(totals)):
                shares_SC[sequence_R[row], c] += (totals[c] - before[c]) / active
        before[:] = totals
    return totals, shares_SC, experts_FX[UNUSED].sum()


@njit(cache=True)
def _route(
    n, layer, need, settings, registers, totals, experts_FX, chances_FX, key_C, demand, queue_FQ,
    first_row_N, token_R, expert_ids_TLK, next_visit_RLK,
):  # fmt: skip
    """Learn what this layer needs, write it to `need` and return how many experts that are."""
    visit = n * settings[LAYERS] + layer
    registers[KNOWN] = visit
    needed = 0
    for row in range(first_row_N[n], first_row_N[n + 1]):
        for k in range(expert_ids_TLK.shape[2]):
            x = layer * settings[EXPERTS] + expert_ids_TLK[token_R[row], layer, k]
            if experts_FX[PINNED, x]:
                continue
            if next_visit_RLK.size:
                experts_FX[NEXT, x] = next_visit_RLK[row, layer, k]
            experts_FX[PINNED, x], experts_FX[STAMP, x] = 1, visit
            chances_FX[COUNT, x] += 1.0
            need[needed] = x
            needed += 1
            totals[LOOKUPS] += 1
            if experts_FX[PLACE, x] == HERE:
                totals[HITS] += 1
                totals[USEFUL] += experts_FX[UNUSED, x]
                key_C[experts_FX[SLOT, x]] = BLOCKED
            else:
                registers[OUTSTANDING] += 1
                if experts_FX[PLACE, x] == COMING:
                    totals[LATE] += 1
                else:
                    totals[DEMANDED] += 1
                    demand[registers[DEMANDS]] = x
                    registers[DEMANDS] += 1
            experts_FX[UNUSED, x] = 0
    while registers[HEAD] < registers[TAIL] and queue_FQ[QUEUE_VISIT, registers[HEAD]] <= visit:
        x = queue_FQ[QUEUE_X, registers[HEAD]]
        if x >= 0 and experts_FX[PLACE, x] == AWAY and not experts_FX[PINNED, x]:
            totals[CANCELLED] += 1
        registers[HEAD] += 1
    target = visit + settings[HORIZON]
    if settings[HORIZON] and target < (len(first_row_N) - 1) * settings[LAYERS]:
        totals[SKIPPED] += registers[WANTED] >= 0
        registers[WANTED] = target
    return needed


@njit(cache=True)
def _next_end(registers):
    end = NEVER
    if registers[LINK_X] >= 0:
        end = min(end, registers[LINK_END])
    if registers[DISK_X] >= 0:
        end = min(end, registers[DISK_END])
    if registers[ASKED] >= 0:
        end = min(end, registers[ASKED_END])
    return end


@njit(cache=True)
def _complete(settings, registers, experts_FX, chances_FX, key_C):
    """End the transfer and the reading that end now."""
    if registers[LINK_X] >= 0 and registers[LINK_END] == registers[CLOCK]:
        x = registers[LINK_X]
        registers[LINK_X] = -1
        experts_FX[PLACE, x] = HERE
        if experts_FX[PINNED, x]:
            registers[OUTSTANDING] -= 1
        else:
            _set_key(x, settings, experts_FX, chances_FX, key_C)
    if registers[DISK_X] >= 0 and registers[DISK_END] == registers[CLOCK]:
        x = registers[DISK_X]
        registers[DISK_X] = -1
        experts_FX[RAM, x], experts_FX[RAM_STAMP, x] = HERE, registers[KNOWN]


@njit(cache=True)
def _set_key(x, settings, experts_FX, chances_FX, key_C):
    """Say by what the policy ranks an expert that is here: the least leaves first, then the one used longest ago."""
    policy = settings[POLICY]
    key = float(experts_FX[STAMP, x])
    if policy in (LFU, LFU_AGED):
        key = chances_FX[COUNT, x]
    elif policy == BELADY:
        key = -float(experts_FX[NEXT, x])
    key_C[experts_FX[SLOT, x]] = BLOCKED if experts_FX[PROTECTED, x] else key


@njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _least(key_C, first, last):
    least = BLOCKED
    for slot in range(first, last):
        least = min(least, key_C[slot])
    return least


@njit(cache=True)
def _slot(layer, settings, registers, experts_FX, chances_FX, steps, expected_L, slots_C, key_C, group_L, first_slot_G):
    """Return the slot that an expert of this layer takes: a free one, else that of the policy's victim, else -1."""
    first, last = first_slot_G[group_L[layer]], first_slot_G[group_L[layer] + 1]
    least = _least(key_C, first, last)
    if least == BLOCKED:
        return -1
    best, best_x = -1, -1
    if settings[POLICY] == GUIDED and least != FREE:
        layers, known, decayed = settings[LAYERS], registers[KNOWN], steps[0] + 1e-3
        longest = -1.0
        for slot in range(first, last):
            if key_C[slot] == BLOCKED:
                continue
            # Expected layers until x is needed: its probability at the next visit, its recent rate after that.
            x = slots_C[slot]
            own = experts_FX[LAYER, x]
            ahead = own - known % layers
            ahead += 0 if ahead > 0 else layers
            rate = min(1.0, (chances_FX[COUNT, x] + 1e-3) / decayed)
            p = chances_FX[P, x] if expected_L[own] > known else rate
            until = ahead + layers * (1.0 - p) / rate
            if until > longest or (
                until == longest and (experts_FX[STAMP, x], x) < (experts_FX[STAMP, best_x], best_x)
            ):
                best, best_x, longest = slot, x, until
        return best
    for slot in range(first, last):
        if key_C[slot] != least:
            continue
        x = slots_C[slot]
        if x < 0:
            return slot
        if best < 0 or (experts_FX[STAMP, x], x) < (experts_FX[STAMP, best_x], best_x):
            best, best_x = slot, x
    return best


@njit(cache=True)
def _start_link(
    settings, registers, totals, experts_FX, chances_FX, steps, expected_L, slots_C, key_C, demand, queue_FQ,
    queue_p_Q, group_L, first_slot_G,
):  # fmt: skip
    chosen, chosen_slot, prefetch = -1, -1, False
    for i in range(registers[DEMANDS]):
        x = demand[i]
        if experts_FX[PLACE, x] == AWAY and (not settings[RAM_SLOTS] or experts_FX[RAM, x] == HERE):
            chosen = x
            chosen_slot = _slot(
                experts_FX[LAYER, x], settings, registers, experts_FX, chances_FX, steps, expected_L, slots_C, key_C,
                group_L, first_slot_G,
            )  # fmt: skip
            break
    slot, slot_group = -1, -1
    for q in range(registers[HEAD], registers[TAIL]):
        if chosen >= 0:
            break
        x = queue_FQ[QUEUE_X, q]
        if x < 0 or experts_FX[PLACE, x] != AWAY or (settings[RAM_SLOTS] and experts_FX[RAM, x] != HERE):
            continue
        if group_L[experts_FX[LAYER, x]] != slot_group:  # the victim is the same for all that share slots
            slot_group = group_L[experts_FX[LAYER, x]]
            slot = _slot(
                experts_FX[LAYER, x], settings, registers, experts_FX, chances_FX, steps, expected_L, slots_C, key_C,
                group_L, first_slot_G,
            )  # fmt: skip
        if slot < 0:
            continue
        victim, visit = slots_C[slot], queue_FQ[QUEUE_VISIT, q]
        if victim >= 0:
            if settings[POLICY] == BELADY:
                sooner = experts_FX[NEXT, victim] <= visit
            else:
                expected = expected_L[experts_FX[LAYER, victim]]
                sooner = registers[KNOWN] < expected <= visit and chances_FX[P, victim] >= queue_p_Q[q]
            if sooner:
                totals[HELD_BACK] += 1 - queue_FQ[QUEUE_HELD, q]
                queue_FQ[QUEUE_HELD, q] = 1
                continue
        queue_FQ[QUEUE_X, q] = -1
        chosen, chosen_slot, prefetch = x, slot, True
    if chosen < 0:
        return
    victim = slots_C[chosen_slot]
    if victim >= 0:
        experts_FX[PLACE, victim] = AWAY
        totals[EVICTED] += 1
        totals[WASTED] += experts_FX[UNUSED, victim]
        experts_FX[UNUSED, victim] = 0
    slots_C[chosen_slot], key_C[chosen_slot] = chosen, BLOCKED
    experts_FX[PLACE, chosen], experts_FX[SLOT, chosen] = COMING, chosen_slot
    experts_FX[RAM_STAMP, chosen] = registers[KNOWN]
    if prefetch:
        totals[PREFETCHED] += 1
        experts_FX[UNUSED, chosen], experts_FX[STAMP, chosen] = 1, registers[KNOWN]
    registers[LINK_X], registers[LINK_END] = chosen, registers[CLOCK] + settings[TRANSFER]
    totals[LINK_NS] += settings[TRANSFER]


@njit(cache=True)
def _start_disk(settings, registers, totals, experts_FX, ram_slots, demand, queue_FQ):
    chosen = -1
    for i in range(registers[DEMANDS]):
        x = demand[i]
        if experts_FX[PLACE, x] == AWAY and experts_FX[RAM, x] == AWAY:
            chosen = x
            break
    for q in range(registers[HEAD], registers[TAIL]):
        if chosen >= 0:
            break
        x = queue_FQ[QUEUE_X, q]
        if x >= 0 and not queue_FQ[QUEUE_READ, q] and experts_FX[PLACE, x] == AWAY and experts_FX[RAM, x] == AWAY:
            queue_FQ[QUEUE_READ, q] = 1
            chosen = x
    if chosen < 0:
        return
    best, best_x = -1, -1  # a free slot, else that of what was moved longest ago and that nothing waits for
    for slot, x in enumerate(ram_slots):
        if x < 0:
            best, best_x = slot, x
            break
        if x == registers[LINK_X] or (experts_FX[PINNED, x] and experts_FX[PLACE, x] == AWAY):
            continue
        if best < 0 or (experts_FX[RAM_STAMP, x], x) < (experts_FX[RAM_STAMP, best_x], best_x):
            best, best_x = slot, x
    if best_x >= 0:
        experts_FX[RAM, best_x] = AWAY
    ram_slots[best] = chosen
    experts_FX[RAM, chosen] = COMING
    registers[DISK_X], registers[DISK_END] = chosen, registers[CLOCK] + settings[READ]
    totals[DISK_READS] += 1
    totals[DISK_NS] += settings[READ]


@njit(cache=True)
def _ask(settings, registers, first_row_N):
    """Begin with the newest request."""
    n = registers[WANTED] // settings[LAYERS]
    rows = first_row_N[n + 1] - first_row_N[n]
    registers[ASKED], registers[WANTED] = registers[WANTED], -1
    registers[ASKED_END] = registers[CLOCK] + settings[PREDICT] * rows


@njit(cache=True)
def _answered(registers, totals):
    """End a prediction; say whether it comes before the router itself."""
    if registers[ASKED] > registers[KNOWN]:
        totals[PREDICTED] += 1
        return True
    totals[SKIPPED] += 1
    registers[ASKED] = -1
    return False


@njit(cache=True)
def _expect(
    settings, registers, chances_FX, expected_L, queue_FQ, queue_p_Q, threshold, first_row_N, token_R, begins_R,
    guess_ids_TLB, guess_p_TLB,
):  # fmt: skip
    """Take in the guesses for the visit asked about, and queue what is worth a prefetch, likeliest first."""
    visit, experts = registers[ASKED], settings[EXPERTS]
    registers[ASKED] = -1
    n, layer = visit // settings[LAYERS], visit % settings[LAYERS]
    missed_E = np.ones(experts)  # probability that no sequence needs it
    named_E = np.zeros(experts, np.bool_)
    for row in range(first_row_N[n], first_row_N[n + 1]):
        if begins_R[row] and layer < settings[HORIZON]:
            continue
        token = token_R[row]
        for b in range(guess_ids_TLB.shape[2]):
            p = float(guess_p_TLB[token, layer, b])
            if p < 0.0:
                break
            expert = guess_ids_TLB[token, layer, b]
            missed_E[expert] *= 1.0 - p
            named_E[expert] |= b < settings[BUDGET]
    expected_L[layer] = visit
    if registers[TAIL] + experts > queue_FQ.shape[1]:
        head, length = registers[HEAD], registers[TAIL] - registers[HEAD]
        for q in range(length):
            queue_FQ[:, q], queue_p_Q[q] = queue_FQ[:, head + q], queue_p_Q[head + q]
        registers[HEAD], registers[TAIL] = 0, length
    first = registers[TAIL]
    for expert in range(experts):
        p = 1.0 - missed_E[expert]
        chances_FX[P, layer * experts + expert] = p
        if not named_E[expert] or p < threshold:
            continue
        q = registers[TAIL]
        while q > first and queue_p_Q[q - 1] < p:
            queue_FQ[QUEUE_X, q], queue_p_Q[q] = queue_FQ[QUEUE_X, q - 1], queue_p_Q[q - 1]
            q -= 1
        queue_FQ[QUEUE_X, q], queue_p_Q[q] = layer * experts + expert, p
        queue_FQ[QUEUE_VISIT, registers[TAIL]] = visit
        queue_FQ[QUEUE_READ, registers[TAIL]] = queue_FQ[QUEUE_HELD, registers[TAIL]] = 0
        registers[TAIL] += 1
