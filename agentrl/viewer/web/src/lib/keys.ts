/** Every action has a key. Pages bind theirs while they stand; `?` lists what is bound now. */
import { onDestroy } from 'svelte'

export interface Binding {
  keys: string
  label: string
  run: (event: KeyboardEvent) => void
}
export interface Scope {
  title: string
  bindings: Binding[]
}

/** What is bound now. Plain, not reactive: a page binds while the one before it is being taken down. */
export const scopes: Scope[] = []

/** Bind keys for as long as the component lives. Keys: `j`, `Shift+ArrowUp`, or two in a row: `g r`. */
export function bind(title: string, bindings: Binding[]): void {
  const scope = { title, bindings }
  scopes.push(scope)
  onDestroy(() => void scopes.splice(scopes.indexOf(scope), 1))
}

let pending = ''
let timer = 0

export function named(event: KeyboardEvent): string {
  const key = event.key === ' ' ? 'Space' : event.key
  const mods = [event.ctrlKey && 'Ctrl', event.altKey && 'Alt', event.metaKey && 'Meta', event.shiftKey && key.length > 1 && 'Shift']
  return [...mods.filter(Boolean), key].join('+')
}

export function handle(event: KeyboardEvent): void {
  const target = event.target as HTMLElement | null
  const writing = target?.closest?.('input:not([type=checkbox]):not([type=radio]):not([type=range]), textarea, select, [contenteditable]')
  if (event.isComposing || event.defaultPrevented) return
  if (writing) {
    if (event.key === 'Escape') target!.blur()
    return
  }
  // A native control keeps its own keys.
  if (target?.closest?.('button, a, summary, [role=slider], input') && (event.key === 'Enter' || event.key === ' ')) return
  if (target?.matches?.('input[type=range], [role=slider]') && event.key.startsWith('Arrow')) return
  if (document.querySelector('dialog[open]')) return
  const key = named(event)
  const both = pending ? `${pending} ${key}` : ''
  const all = scopes.flatMap((scope) => scope.bindings).reverse()
  const is = (b: Binding, text: string) => b.keys.split(' / ').includes(text)
  const found = (both && all.find((b) => is(b, both))) || all.find((b) => is(b, key))
  window.clearTimeout(timer)
  if (found) {
    pending = ''
    event.preventDefault()
    found.run(event)
  } else if (all.some((b) => b.keys.split(' / ').some((k) => k.startsWith(`${key} `)))) {
    pending = key
    timer = window.setTimeout(() => (pending = ''), 900)
  } else pending = ''
}
