"""The simulation in plain Python: what `prefetch.kernel` compiles, written to be read, and to check it by.

Takes the same arguments and returns the same; a few thousand times slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from prefetch.kernel import BELADY, COUNTERS, GUIDED, LFU, LFU_AGED, Machine, Start, Work

NEVER = float("inf")


@dataclass
class Expert:
    """One expert of one layer, and what the machine knows of it."""

    x: int
    layer: int
    place: str = "away"  # from the GPU; or "here", or "coming"
    in_ram: bool = True
    unused: bool = False  # brought by a prefetch, not needed since
    last_use: tuple[int, int] = (-(2**62), 0)  # visit
    count: float = 0.0
    next_visit: int = 0
    protected: bool = False
    expected_at: int = -1  # the visit that `probability` is for
    probability: float = 0.0
    ram_use: int = -(2**62)


@dataclass
class Prefetch:
    """A guess that waits for the link."""

    expert: Expert
    visit: int
    probability: float
    was_read: bool = False
    was_held_back: bool = False


@dataclass
class Channel:
    """The link, the disk or the predictor: does one thing at a time, to its end."""

    task: Expert | int | None = None
    end: float = NEVER

    def start(self, task: Expert | int, end: float) -> None:
        self.task, self.end = task, end


@dataclass
class Decoding:
    """A run under way."""

    machine: Machine
    work: Work
    start: Start
    clock: int = 0
    visit: int = -1  # whose router has chosen
    steps: float = 0.0
    needed: list[Expert] = field(default_factory=list)
    demands: list[Expert] = field(default_factory=list)
    queue: list[Prefetch] = field(default_factory=list)
    link: Channel = field(default_factory=Channel)
    disk: Channel = field(default_factory=Channel)
    predictor: Channel = field(default_factory=Channel)
    request: int | None = None
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def __post_init__(self) -> None:
        machine, start = self.machine, self.start
        self.steps = float(machine.half_life)
        self.experts = [
            Expert(
                x,
                x // machine.experts,
                in_ram=machine.ram_slots == 0,
                count=float(start.rate_X[x]) * machine.half_life,
                next_visit=int(self.work.first_visit_X[x]),
                protected=bool(start.protected_X[x]),
            )
            for x in range(machine.layers * machine.experts)
        ]
        self.slots: list[Expert | None] = []
        for rank, x in enumerate(start.slots_C):
            self.slots.append(self.experts[x] if x >= 0 else None)
            if x >= 0:
                self.experts[x].place, self.experts[x].last_use = "here", (-1 - rank, 0)
        self.ram: list[Expert | None] = []
        for rank, x in enumerate(start.ram_slots):
            self.ram.append(self.experts[x] if x >= 0 else None)
            if x >= 0:
                self.experts[x].in_ram, self.experts[x].ram_use = True, -1 - rank

    def add(self, counter: str, amount: int = 1) -> None:
        self.totals[counter] += amount

    def run(self, sequences: int) -> tuple[np.ndarray, np.ndarray, int]:
        machine, work = self.machine, self.work
        shares_SC = np.zeros((sequences, len(COUNTERS)))
        for n in range(len(work.first_row_N) - 1):
            rows = range(work.first_row_N[n], work.first_row_N[n + 1])
            before = dict(self.totals)
            self.work_until(self.clock + machine.other_ns_A[len(rows)])
            self.add("other_ns", machine.other_ns_A[len(rows)])
            for layer in range(machine.layers):
                self.work_until(self.clock + machine.attention_ns_A[len(rows)])
                self.add("attention_ns", machine.attention_ns_A[len(rows)])
                self.route(n, layer, rows)
                began = self.clock
                while any(expert.place != "here" for expert in self.needed):
                    self.begin_transfers()
                    self.end_what_ends(min(self.link.end, self.disk.end, self.predictor.end))
                self.demands = []
                self.add("waiting_ns", self.clock - began)
                computing = machine.experts_ns_AE[len(rows), len(self.needed)]
                self.work_until(self.clock + computing)
                self.add("experts_ns", computing)
                self.needed = []
            self.steps += 1
            if machine.policy in (LFU_AGED, GUIDED) and (n + 1) % machine.half_life == 0:
                self.steps /= 2
                for expert in self.experts:
                    expert.count /= 2
            self.add("tokens", len(rows))
            for row in rows:
                for c, name in enumerate(COUNTERS):
                    shares_SC[work.sequence_R[row], c] += (self.totals[name] - before[name]) / len(rows)
        left = sum(expert.unused for expert in self.experts)
        return np.array(list(self.totals.values()), dtype=np.int64), shares_SC, left

    def route(self, n: int, layer: int, rows: range) -> None:
        self.visit = n * self.machine.layers + layer
        for row in rows:
            for k, expert_id in enumerate(self.work.expert_ids_TLK[self.work.token_R[row], layer]):
                expert = self.experts[layer * self.machine.experts + int(expert_id)]
                if self.work.next_visit_RLK.size:
                    expert.next_visit = int(self.work.next_visit_RLK[row, layer, k])
                if expert not in self.needed:
                    self.needed.append(expert)
        for expert in self.needed:
            self.add("lookups")
            self.add({"here": "hits", "coming": "late", "away": "demanded"}[expert.place])
            self.add("useful", expert.place == "here" and expert.unused)
            expert.unused = False
            expert.last_use = (self.visit, 0)
            expert.count += 1
        self.demands = [expert for expert in self.needed if expert.place == "away"]
        late = [each for each in self.queue if each.visit <= self.visit]
        self.add("cancelled", sum(e.expert.place == "away" and e.expert not in self.needed for e in late))
        self.queue = [each for each in self.queue if each.visit > self.visit]
        target = self.visit + self.machine.horizon
        if self.machine.horizon and target < (len(self.work.first_row_N) - 1) * self.machine.layers:
            self.add("skipped", self.request is not None)
            self.request = target

    def work_until(self, until: int) -> None:
        while self.clock < until:
            self.begin_transfers()
            end = min(self.link.end, self.disk.end, self.predictor.end)
            if end > until:
                break
            self.end_what_ends(end)
        self.clock = until

    def begin_transfers(self) -> None:
        if self.predictor.task is None and self.request is not None:
            n = self.request // self.machine.layers
            rows = self.work.first_row_N[n + 1] - self.work.first_row_N[n]
            self.predictor.start(self.request, self.clock + rows * self.machine.predict_ns)
            self.request = None
        if self.machine.ram_slots and self.disk.task is None:
            self.begin_reading()
        if self.link.task is None:
            self.begin_transfer()

    def begin_reading(self) -> None:
        wanted = [expert for expert in self.demands if expert.place == "away" and not expert.in_ram]
        if not wanted:
            guess = next(
                (g for g in self.queue if not g.was_read and g.expert.place == "away" and not g.expert.in_ram), None
            )
            if guess is None:
                return
            guess.was_read = True
            wanted = [guess.expert]
        if None in self.ram:
            slot = self.ram.index(None)
        else:
            waited_for = [expert for expert in self.demands if expert.place == "away"]
            free = [e for e in self.ram if e is not None and e is not self.link.task and e not in waited_for]
            victim = min(free, key=lambda expert: (expert.ram_use, expert.x))
            victim.in_ram = False
            slot = self.ram.index(victim)
        self.ram[slot] = wanted[0]
        self.disk.start(wanted[0], self.clock + self.machine.read_ns)
        self.add("disk_reads")
        self.add("disk_ns", self.machine.read_ns)

    def begin_transfer(self) -> None:
        for expert in self.demands:
            if expert.place == "away" and expert.in_ram:
                slot = self.slot_for(expert)
                assert slot is not None, "the cache holds every expert that a layer needs"
                self.transfer(expert, slot)
                return
        for guess in list(self.queue):
            fetchable = guess.expert.place == "away" and guess.expert.in_ram
            slot = self.slot_for(guess.expert) if fetchable else None
            if slot is None:
                continue
            if self.needed_sooner(self.slots[slot], guess):
                self.add("held_back", not guess.was_held_back)
                guess.was_held_back = True
                continue
            self.queue.remove(guess)
            self.add("prefetched")
            guess.expert.unused = True
            guess.expert.last_use = (self.visit, 0)
            self.transfer(guess.expert, slot)
            return

    def transfer(self, expert: Expert, slot: int) -> None:
        victim = self.slots[slot]
        if victim is not None:
            victim.place = "away"
            self.add("evicted")
            self.add("wasted", victim.unused)
            victim.unused = False
        self.slots[slot] = expert
        expert.place = "coming"
        expert.ram_use = self.visit
        self.link.start(expert, self.clock + self.machine.transfer_ns)
        self.add("link_ns", self.machine.transfer_ns)

    def slot_for(self, expert: Expert) -> int | None:
        group = self.machine.group_L[expert.layer]
        own = range(self.machine.first_slot_G[group], self.machine.first_slot_G[group + 1])
        free = [slot for slot in own if self.slots[slot] is None]
        if free:
            return free[0]
        residents = [(self.slots[slot], slot) for slot in own]
        victims = [
            (self.rank(each), each.last_use, each.x, slot)
            for each, slot in residents
            if each is not None and each.place == "here" and not each.protected and each not in self.needed
        ]
        return min(victims)[-1] if victims else None

    def rank(self, expert: Expert) -> float:
        """By what the policy chooses; the least leaves."""
        if self.machine.policy in (LFU, LFU_AGED):
            return expert.count
        if self.machine.policy == BELADY:
            return -float(expert.next_visit)
        if self.machine.policy == GUIDED:
            layers = self.machine.layers
            ahead = next(d for d in range(1, layers + 1) if (self.visit + d) % layers == expert.layer)
            rate = min(1.0, (expert.count + 1e-3) / (self.steps + 1e-3))
            p = expert.probability if expert.expected_at > self.visit else rate
            return -(ahead + layers * (1.0 - p) / rate)
        return 0.0

    def needed_sooner(self, victim: Expert | None, guess: Prefetch) -> bool:
        if victim is None:
            return False
        if self.machine.policy == BELADY:
            return victim.next_visit <= guess.visit
        expected = self.visit < victim.expected_at <= guess.visit
        return expected and victim.probability >= guess.probability

    def end_what_ends(self, now: float) -> None:
        self.clock = int(now)
        if self.link.end == now:
            assert isinstance(self.link.task, Expert)
            self.link.task.place = "here"
            self.link = Channel()
        if self.disk.end == now:
            assert isinstance(self.disk.task, Expert)
            self.disk.task.in_ram, self.disk.task.ram_use = True, self.visit
            self.disk = Channel()
        if self.predictor.end == now:
            assert isinstance(self.predictor.task, int)
            in_time = self.predictor.task > self.visit
            self.add("predicted" if in_time else "skipped")
            if in_time:
                self.expect(self.predictor.task)
            self.predictor = Channel()

    def expect(self, visit: int) -> None:
        n, layer = divmod(visit, self.machine.layers)
        own = self.experts[layer * self.machine.experts : (layer + 1) * self.machine.experts]
        missed = [1.0] * len(own)
        named: set[int] = set()
        for row in range(self.work.first_row_N[n], self.work.first_row_N[n + 1]):
            if self.work.begins_R[row] and layer < self.machine.horizon:
                continue
            token = self.work.token_R[row]
            guesses = zip(self.work.guess_ids_TLB[token, layer], self.work.guess_p_TLB[token, layer], strict=True)
            for b, (expert_id, p) in enumerate(guesses):
                if p < 0:
                    break
                missed[expert_id] *= 1.0 - float(p)
                if b < self.machine.budget:
                    named.add(int(expert_id))
        for expert, miss in zip(own, missed, strict=True):
            expert.expected_at, expert.probability = visit, 1.0 - miss
        chosen = [own[e] for e in sorted(named) if own[e].probability >= self.machine.threshold]
        chosen.sort(key=lambda expert: -expert.probability)
        self.queue += [Prefetch(expert, visit, expert.probability) for expert in chosen]


def run(machine: Machine, work: Work, start: Start, sequences: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Decode everything; return totals (C,), their shares by sequence (S, C), and prefetches never used at the end."""
    return Decoding(machine, work, start).run(sequences)
