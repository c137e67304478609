/** What the server sends (see docs/viewer.md); missing numbers are null. */
export type Num = number | null
export interface Run {
  run: string
  name: string
  folder: string
  status: string
  started: Num
  steps: number
  stages: string[]
  episodes: number
  env: string
  model: string
  best: Num
  problems: string[]
  read_only: boolean
  curves?: Record<string, Num[]>
  key?: string
}
export interface RunDetail extends Run {
  config: string
  command: string[]
  versions: Record<string, unknown>
  eval: Record<string, any>[]
  summary: Record<string, any> | null
  rescored?: { file: string; created: string | null; env: string | null; how: Record<string, number>; n: number; changed: number; old: Num; new: Num; problem: string | null }[]
}
export type Line = { stage: string; step: number; time: number } & Record<string, number | string>
export interface Entry {
  rowid: number
  id: string
  attempt: number
  stage: string
  step: number
  split: string
  group_id: string
  task_id: string
  env: string
  source: string
  parent: string | null
  outcome: string
  why: string | null
  reward: Num
  success: boolean | null
  n_turns: number
  n_calls: number
  n_tokens: number
  n_errors: number
  tool_cost: number
  turn_cost: number
  seconds: number
  latest: boolean
  /** null where the time for snippets was over before its turn came. */
  snippet?: [string, boolean][] | null
}
export interface ListPage { entries: Entry[]; next: string | null; last: string | null; took_ms: number }
export interface Facets {
  stages: string[]
  splits: string[]
  outcomes: Record<string, number>
  steps: Record<string, [number, number]>
  sources: string[]
  envs: string[]
}
export interface Hint { kind: string; columns?: string[]; rows?: unknown[][]; cells?: unknown[][] }
export interface Tool {
  name: string
  arguments: unknown
  id: string
  result: { text: string; ok: boolean; error: string | null; seconds: number; cost: number; images: string[] }
  hint: Hint | null
}
export interface Turn {
  index: number
  actor: string
  text: string
  final_text: string
  thinking: string | null
  context_tokens: Num
  new_context: { role: string; origin?: string; text: string }[] | null
  sampling: Record<string, any>
  finish: string
  versions: { version: number; start: number; stop: number }[]
  tools: Tool[]
  observation: string
  error: string | null
  reward: Num
  anchor: string | null
  cost: number
  seconds: number
  began: Num
  n_sampled: number
  images?: string[]
}
export interface CreditLine {
  step: number
  stage: string
  group_id: string
  member: number
  reward: Num
  parts: Record<string, Num>
  turn_rewards: number[] | null
  source: string
  advantage?: Num
}
export interface Trajectory {
  entry: Entry
  seed: number | string
  spec: string
  score: Record<string, Num>
  reward: Num
  success: boolean | null
  outcome: { kind: string; why: string | null; detail: string }
  fork: { parent: string; turn: number; token: number } | null
  extra: Record<string, any>
  attempts: number[]
  source: string
  turns: Turn[]
  prev: string | null
  next: string | null
  credit: CreditLine[]
  rescored?: { file: string; created: string | null; env: string | null; how: string; why: string; parts: Record<string, Num> | null; reward: Num; success: boolean | null }[]
  live: boolean
}
export interface Member {
  member: number
  id: string
  source: string
  reward: Num
  advantage: Num
  success: boolean | null
  outcome: string
  why: string | null
  n_turns: number
  n_calls: number
  n_tokens: number
  tool_cost: number
  parts: Record<string, Num>
}
export interface Group {
  group_id: string
  task_id: string
  prompt: string
  step: number
  stage: string
  zero_variance: boolean
  members: Member[]
  left_out?: number
  shared: { tokens: number; turns: number }
  first_divergence: Record<string, { turn: number; token: number; at?: number } | null>
  /** The first sibling with exactly the same tokens. */
  identical?: Record<string, string>
}
export interface TreeNode {
  id: string
  parent: string | null
  /** Forks of one turn that lie in runs of their own have the same id; their keys differ. */
  key: string
  under: string | null
  run: string | null
  turn: Num
  token: Num
  reward: Num
  advantage: Num
  turns: { index: number; n_sampled: number; calls: string[] }[]
}
/** `first_token` counts sampled tokens, −1 is the prompt before them, whose two texts are `contexts`. */
export interface DiffTurn { index: number; same: boolean; a: Turn | null; b: Turn | null; first_token: Num; contexts?: (string | null)[] | null }
export interface Explained {
  token: Record<string, any>
  chain: { name: string; component: string | null; value: Num; of: string; numbers: Record<string, Num> }[]
  /** null: the advantage was not made again, and `unchecked` says why. */
  adds_up: boolean | null
  unchecked: string | null
}
export interface Flight {
  id: string
  step: number
  task_id: string
  group_id: string
  turns: number
  doing: string
  seconds: number
}
