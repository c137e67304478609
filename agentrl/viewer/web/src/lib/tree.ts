/** Where the branches of a group stand: time goes right by turns, each trajectory has a line of its own. */
import type { TreeNode } from './types'

export interface Placed {
  node: TreeNode
  row: number
  /** The turn at which it leaves its parent; 0 for a root. */
  from: number
  parentRow: number | null
}

/** Children follow their parent, those that leave last first, so that no connection crosses a line. */
export function layout(nodes: TreeNode[]): Placed[] {
  const known = new Set(nodes.map((n) => n.key))
  const children = new Map<string | null, TreeNode[]>()
  for (const node of nodes) {
    const parent = node.under !== null && known.has(node.under) && node.under !== node.key ? node.under : null
    children.set(parent, [...(children.get(parent) ?? []), node])
  }
  const out: Placed[] = []
  const seen = new Set<string>()
  const place = (node: TreeNode, parentRow: number | null): void => {
    if (seen.has(node.key)) return
    seen.add(node.key)
    const row = out.length
    out.push({ node, row, from: parentRow === null ? 0 : (node.turn ?? 0), parentRow })
    for (const child of [...(children.get(node.key) ?? [])].sort((a, b) => (b.turn ?? 0) - (a.turn ?? 0))) place(child, row)
  }
  for (const root of children.get(null) ?? []) place(root, null)
  // A ring of parents has no root; its members are shown as roots.
  for (const node of nodes) place(node, null)
  return out
}
