// `fragments: 'tree'` makes elements one by one: no innerHTML anywhere, so nothing for trusted types to object to.
export default { compilerOptions: { fragments: 'tree', runes: true } }
